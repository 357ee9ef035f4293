"""Drawings of a training run, as PNG and without a display: its loss curve, and images with a model's answers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from megatron_vlbridge.errors import VLBridgeError

DPI = 100
CURVE_INCHES = (10.0, 5.6)
CELL_INCHES = (0.86, 1.06)
TITLE_INCHES = 0.75
SHEET_COLUMNS = 18
ANSWER_CHARACTERS = 13  # as many as fit into a cell
INK, FAINT, ACCENT, WRONG = "#1f2933", "#9aa5b1", "#1f6feb", "#d1242f"


def draw_loss_curve(losses: Sequence[float], path: str | Path, *, title: str = "Training loss") -> None:
    """Draws the loss of each iteration (nats per answer token, logarithmic) and its running mean; 1000 x 560 pixels.

    Raises VLBridgeError: there is no loss, or one is not finite.
    """
    values = np.asarray(losses, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values))
        found = f"iteration {bad[0] + 1} has {values[bad[0]]}" if bad.size else "there are none"
        raise VLBridgeError(f"loss curve {path}: expected finite losses; {found}")
    figure = Figure(figsize=CURVE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    iterations = np.arange(1, values.size + 1)
    window = max(1, values.size // 30)
    axes.plot(iterations, values, color=FAINT, linewidth=1, alpha=0.8, label="each iteration")
    axes.plot(
        iterations[window - 1 :],
        np.convolve(values, np.full(window, 1 / window), mode="valid"),
        color=ACCENT,
        linewidth=2.2,
        label=f"mean of the last {window}",
    )
    axes.set_yscale("log", nonpositive="clip")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(1, max(2, values.size))
    axes.set_xlabel("iteration", color=INK)
    axes.set_ylabel("loss (nats per answer token)", color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=15, fontweight="bold", pad=12)
    axes.grid(which="major", color=FAINT, alpha=0.35, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def draw_answer_sheet(
    images: Sequence[Image.Image],
    expected: Sequence[str],
    answered: Sequence[str],
    path: str | Path,
    *,
    title: str = "Held-out images",
) -> None:
    """Draws every image with the model's answer below it; wrong ones red, with the right one in brackets.

    The sheet has up to 18 images in a row, each in a cell of 86 x 106 pixels, below a headline with the count.

    Raises VLBridgeError: no image is given, or the three sequences differ in length.
    """
    if not len(images) == len(expected) == len(answered) > 0:
        raise VLBridgeError(
            f"answer sheet {path}: {len(images)} images, {len(expected)} expected and {len(answered)} given answers; "
            "expected the same number of each, at least one"
        )
    columns = min(SHEET_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    # Never narrower than the headline.
    cells_across = max(columns, 6)
    width, height = cells_across * CELL_INCHES[0], TITLE_INCHES + rows * CELL_INCHES[1]
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1 - TITLE_INCHES / height))
    axes.set_axis_off()
    for number, (image, right, found) in enumerate(zip(images, expected, answered, strict=True)):
        _draw_answer(axes, number % columns, number // columns, image, right, found)
    # imshow changes the limits and the aspect with each image: set them last. Row 0 is at the top.
    axes.set(xlim=(0, cells_across), ylim=(rows, 0), aspect="auto")
    good = sum(right == found for right, found in zip(expected, answered, strict=True))
    headline = f"{title}: {good} of {len(images)} right ({good / len(images):.1%})"
    y = 1 - TITLE_INCHES / 2 / height
    figure.text(0.18 / width, y, headline, color=INK, fontsize=15, fontweight="bold", va="center")
    _save(figure, path)


def _draw_answer(axes: Axes, column: int, row: int, image: Image.Image, right: str, found: str) -> None:
    """One cell of the sheet: the image in its upper part, the answer below."""
    left, top, wide, high = column + 0.14, row + 0.04, 0.72, 0.72 * CELL_INCHES[0] / CELL_INCHES[1]
    axes.imshow(np.asarray(image.convert("RGB")), extent=(left, left + wide, top + high, top), interpolation="nearest")
    lines, color = [_shortened(found)], INK
    if found != right:
        lines, color = [*lines, _shortened(f"({right})")], WRONG
        axes.add_patch(Rectangle((left, top), wide, high, fill=False, edgecolor=WRONG, linewidth=2.5))
    # A model may answer anything, also with the signs that would start a formula.
    text = "\n".join(lines)
    axes.text(column + 0.5, top + high + 0.06, text, color=color, fontsize=8.5, ha="center", va="top", parse_math=False)


def _shortened(text: str) -> str:
    """The text in one line, as long as fits into a cell."""
    line = " ".join(text.split()) or "(nothing)"
    return line if len(line) <= ANSWER_CHARACTERS else line[: ANSWER_CHARACTERS - 1] + "…"


def _save(figure: Figure, path: str | Path) -> None:
    """Writes the figure beside its place and moves it there, so that no half-written image has the final name."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".unfinished")
    with unfinished.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)
    unfinished.replace(target)
