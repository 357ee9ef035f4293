"""A summary of conversations as one HTML page without scripts or external files."""

from collections.abc import Sequence
from html import escape

import numpy as np

from megatron_vlbridge.data.report.summary import Piece, Shown, Summary, totals

BINS = 40
WIDTH, HEIGHT, MARGIN = 520, 120, 40
STYLE = """
body{font:14px sans-serif;max-width:1100px;margin:24px auto;color:#222}
table{border-collapse:collapse;margin:8px 0}td,th{border:1px solid #ccc;padding:3px 10px;text-align:right}
td:first-child,th:first-child{text-align:left}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:10px;font:12px monospace}
mark{background:#bfe8c4}img{margin:2px;vertical-align:top}svg text{font:10px sans-serif;fill:#444}
.failure{color:#a00}
"""


def page(summaries: Sequence[Summary]) -> str:
    """The page: a table, histograms, failures, and the shown conversations with supervised tokens on green."""
    body = "\n".join(_section(summary) for summary in summaries)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Conversations</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>Conversations</h1>\n{body}\n</body></html>\n"
    )


def histogram(values: Sequence[int], title: str) -> str:
    """A histogram as SVG; each bar has a tooltip with its range and count."""
    counts, edges = np.histogram(values, min(BINS, max(1, len(set(values)))))
    bar = (WIDTH - 2 * MARGIN) / len(counts)
    bars = "".join(
        f'<rect x="{MARGIN + index * bar:.1f}" y="{HEIGHT - MARGIN / 2 - height:.1f}" width="{max(bar - 1, 0.5):.1f}" '
        f'height="{height:.1f}" fill="#1f77b4"><title>{edges[index]:.0f} to {edges[index + 1]:.0f}: {count}</title>'
        "</rect>"
        for index, count in enumerate(counts.tolist())
        for height in [count / counts.max() * (HEIGHT - MARGIN)]
    )
    below = HEIGHT - 6
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img"><text x="{MARGIN}" y="12">{escape(title)}</text>{bars}'
        f'<text x="{MARGIN}" y="{below}">{edges[0]:.0f}</text>'
        f'<text x="{WIDTH - MARGIN}" y="{below}" text-anchor="end">{edges[-1]:.0f}</text>'
        f'<text x="{MARGIN - 4}" y="{MARGIN / 2 + 4}" text-anchor="end">{counts.max()}</text></svg>'
    )


def _section(summary: Summary) -> str:
    parts = [f"<h2>{escape(summary.name)}</h2>", _totals(summary)]
    if summary.lengths:
        parts.append(_roles(summary))
        parts.append(histogram(summary.lengths, "tokens of a conversation"))
        if any(summary.patches):
            parts.append(histogram(summary.patches, "patches of a conversation"))
    parts += [f"<p>{escape(report)}</p>" for report in summary.turns.reports]
    parts += [_texts("Failures", summary.failures), _texts("Excluded turns", summary.excluded)]
    if summary.shown:
        parts.append("<h3>Samples</h3><p>Tokens on green are learned; all others are context.</p>")
        parts += [_shown(one) for one in summary.shown]
    return "\n".join(parts)


def _texts(title: str, texts: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<h3>{title}</h3><ul class="failure">{items}</ul>' if texts else ""


def _totals(summary: Summary) -> str:
    cells = totals(summary)
    head = "".join(f"<th>{name}</th>" for name in cells)
    return f"<table><tr>{head}</tr><tr>{''.join(f'<td>{value:,}</td>' for value in cells.values())}</tr></table>"


def _roles(summary: Summary) -> str:
    rows = "".join(
        f"<tr><td>{escape(role)}</td><td>{count:,}</td><td>{summary.supervised[role]:,}</td></tr>"
        for role, count in summary.tokens.most_common()
    )
    return f"<table><tr><th>role</th><th>tokens</th><th>supervised</th></tr>{rows}</table>"


def _shown(one: Shown) -> str:
    images = "".join(f'<img src="{url}" alt="">' for url in one.images)
    if one.hidden:
        images += f"<p>and {one.hidden} more images or video files</p>"
    return f"<h4>{escape(one.location)}</h4>{images}<pre>{''.join(map(_piece, one.pieces))}</pre>"


def _piece(piece: Piece) -> str:
    return f"<mark>{escape(piece.text)}</mark>" if piece.supervised else escape(piece.text)
