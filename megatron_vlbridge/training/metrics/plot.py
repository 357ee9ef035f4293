"""Draws the CSV file of a run as SVG, alone or in an HTML page: a panel for each column that has values."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.metrics.columns import COLUMNS, LOSSES, MEASURED
from megatron_vlbridge.training.metrics.csv_file import read_rows

Points = Sequence[tuple[float, float]]

_TITLES = {"seconds": "seconds per iteration", "grad_norm": "grad norm", "learning_rate": "learning rate"}
_WIDTH, _HEIGHT, _COLUMNS = 360, 200, 3
# Space around the lines of a panel: for the values on the left, the title above, the iterations below.
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 28, 14, 24
_STYLE = (
    "text{font:11px sans-serif;fill:#333}.title{font-weight:bold}"
    "path{fill:none;stroke:#1f77b4;stroke-width:1.5;stroke-linecap:round;stroke-linejoin:round}"
)
_SUFFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


def plot(source: str | Path, target: str | Path | None = None) -> Path:
    """Draw the rows of a CSV file; gives the file written, by default `source` with the suffix `.svg`.

    Raises VLBridgeError: `source` is not a file of a run or has no rows, or `target` ends in neither .svg nor .html.
    Example: `plot("metrics.csv", "metrics.html")`.
    """
    file = Path(source).with_suffix(".svg") if target is None else Path(target)
    if file.suffix not in (".svg", ".html"):
        raise VLBridgeError(f"{file}: expected a name that ends in .svg or .html, found {file.suffix or 'no suffix'!r}")
    rows = read_rows(source)
    if not rows:
        raise VLBridgeError(f"{source}: expected rows after the header, found none; has the run logged an iteration?")
    panels = [(name(column), points) for column in COLUMNS[1:] if (points := points_of(rows, column))]
    drawing = svg(panels)
    if file.suffix == ".html":
        title = escape(str(source))
        drawing = f'<!DOCTYPE html>\n<html><head><meta charset="utf-8"><title>{title}</title></head>\n<body>{drawing}'
        drawing += "</body></html>\n"
    try:
        file.write_text(drawing, encoding="utf-8")
    except OSError as error:
        raise VLBridgeError(f"{file}: cannot write: {error.strerror}; check the folder and its permissions") from error
    return file


def name(column: str) -> str:
    """The title of a column's panel."""
    return (LOSSES | MEASURED | _TITLES)[column]


def points_of(rows: Sequence[dict[str, float]], column: str) -> Points:
    """Iteration and value of each row that has a finite value in the column."""
    return [(row["iteration"], row[column]) for row in rows if math.isfinite(row.get(column, math.nan))]


def svg(panels: Sequence[tuple[str, Points]]) -> str:
    """A drawing of panels, each a title and points (iteration, value); all have the same axis of iterations."""
    iterations = [x for _, points in panels for x, _ in points]
    ends = min(iterations, default=0.0), max(iterations, default=1.0)
    height = -(-len(panels) // _COLUMNS) * _HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_COLUMNS * _WIDTH}" height="{height}">',
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (title, points) in enumerate(panels):
        x, y = number % _COLUMNS * _WIDTH, number // _COLUMNS * _HEIGHT
        parts.append(f'<g transform="translate({x},{y})">{_panel(title, points, ends)}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(title: str, points: Points, ends: tuple[float, float]) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    values = ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = values[0], values[-1]

    def across(x: float) -> float:
        return _scaled(x, *ends, _LEFT, right)

    def up(y: float) -> float:
        return _scaled(y, low, high, bottom, _TOP)

    parts = [f'<text class="title" x="{_LEFT}" y="16">{escape(title)}</text>']
    for value in values:
        at = up(value)
        parts.append(f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in sorted(set(ends)):
        anchor = "start" if value == ends[0] else "end"
        parts.append(f'<text x="{across(value):.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{value:.0f}</text>')
    places = [f"{across(x):.1f} {up(y):.1f}" for x, y in points]
    # The last place twice: a line of length 0 with round ends is a dot, for a single point.
    parts.append(f'<path d="M{" L".join([*places, places[-1]])}"/>')
    return "".join(parts)


def _scaled(value: float, low: float, high: float, start: float, end: float) -> float:
    """`value` between `low` and `high`, as a place between `start` and `end`; the middle if there is no range."""
    return (start + end) / 2 if high == low else start + (value - low) / (high - low) * (end - start)


def ticks(low: float, high: float) -> list[float]:
    """Round values at equal steps (1, 2 or 5 times a power of 10), at most 7, from at most `low` to at least `high`.

    Example: `ticks(0.13, 0.47)` is `[0.1, 0.2, 0.3, 0.4, 0.5]`.
    """
    if high == low:
        return [low]
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(s for factor in (0.2, 0.5, 1, 2, 5, 10) if (high - low) / (s := factor * power) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number as it stands at an axis.

    Example: `short(1500.0), short(0.25), short(2e-7)` is `("1.5k", "0.25", "2e-07")`.
    """
    suffix, scale = next(
        ((suffix, scale) for suffix, scale in reversed(_SUFFIXES.items()) if abs(value) >= scale), ("", 1.0)
    )
    return f"{value / scale:.4g}{suffix}"
