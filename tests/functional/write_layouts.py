"""Runs every row of the matrix with its variants and writes docs/layouts.md.

Use: python -m tests.functional.write_layouts [--kinds dense linear]

Ends with an error where a figure is not within the tolerance. With `--check` the page is left as it is; with `--kinds`
so are the sections of other kinds.
"""

# What imports Megatron is imported inside the functions: the workers import this file too.
import argparse
import datetime as dt
import importlib.metadata
import multiprocessing
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tests.functional.kinds import KINDS
from tests.functional.pool import Layout, Pool

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"
# The section that tests.te.write_layouts writes.
TE_HEADING = "## The TE backend"
COLUMNS = ("tp", "sp", "pp", "vpp", "cp", "ep", "etp", "dp", "stages")


def measure(kind: str) -> tuple[list[str], list[str], int]:
    """The table's lines for this kind of model, what failed, and how many runs there were."""
    from tests.functional import matrix

    torch.set_num_threads(1)  # the workers need the cores
    lines, failures, count = [], [], 0
    pool = Pool()
    with tempfile.TemporaryDirectory() as where:
        folders = matrix.write_folders(Path(where), [kind])
        for layout in matrix.layouts(kind):
            start = time.monotonic()
            chosen = matrix.variants(kind, layout)
            try:
                errors = matrix.run(pool, kind, layout, chosen, folders)
            except AssertionError as error:
                failures.append(f"{kind} {layout}: {error}")
                print(f"{kind} {layout}: failed", flush=True)
                lines.append(_line(kind, layout, chosen, None))
                continue
            count += len(errors)
            for variant, error in zip(chosen, errors, strict=True):
                if error.too_large():
                    failures.append(f"{kind} {layout} {variant}: {list(error.too_large().items())[:4]}")
            lines.append(_line(kind, layout, chosen, errors))
            worst = max(x for error in errors for x in error.gradients.values())
            seconds = time.monotonic() - start
            print(f"{kind} {layout}: {len(chosen)} variants, worst gradient {worst:.1e}, {seconds:.1f} s", flush=True)
    pool.close()
    return lines, failures, count


def first_cells(kind: str, layout: Layout) -> str:
    """The cells of the page that tell the row from the others."""
    sizes = {name: getattr(layout, name) for name in COLUMNS}
    sizes["etp"] = (layout.etp or layout.tp) if KINDS[kind].experts else 1
    cells = ["yes" if value is True else "" if value in (1, False, None) else f"{value}" for value in sizes.values()]
    cells[-1] = f"`{cells[-1]}`".replace("|", "\\|") if cells[-1] else ""
    return f"| {' | '.join(cells)} |"


def _line(kind: str, layout: Layout, chosen: list[Any], errors: list[Any] | None) -> str:
    padded = "packs, padded" if any(v.padded for v in chosen) else "packs"
    kept = "" if any(v.recompute == "selective" for v in chosen) else " (some variants)"
    if errors is None:
        return f"{first_cells(kind, layout)} {padded}{kept} | failed | | |"
    worst = (
        max(e.logits for e in errors),
        max(e.loss for e in errors),
        max(x for e in errors for x in e.gradients.values()),
    )
    return f"{first_cells(kind, layout)} {padded}{kept} | {' | '.join(f'{x:.1e}' for x in worst)} |"


def made(kind: str, count: int) -> str:
    """The line of the page that says when a section was made."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("megatron-core", "transformers", "torch")
    )
    return f"- {KINDS[kind].model}: {count} runs, {dt.date.today()}, {platform.machine()} CPU, {versions}"


def on_the_page(kind: str) -> tuple[list[str], str]:
    """The table's lines for this kind of model, and when they were made, as the page has them."""
    text, model = PAGE.read_text(), KINDS[kind].model
    section = text.split(f"\n## {model}\n")[1].split("\n## ")[0].strip()
    return section.splitlines()[2:], next(x for x in text.splitlines() if x.startswith(f"- {model}: "))


def page(sections_of: dict[str, tuple[list[str], str]]) -> str:
    """The whole page, of the table's lines of each kind and when they were made."""
    from tests.functional.parity import DELTA_RULE, TOLERANCE

    names = [*COLUMNS, "input", "logits", "loss", "worst gradient"]
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}"
    sections = "\n\n".join(
        f"## {KINDS[kind].model}\n\n{head}\n" + "\n".join(lines) for kind, (lines, _) in sections_of.items()
    )
    dates = "\n".join(date for _, date in sections_of.values())
    return f"""# Layouts that are proved

Each row is a parallel layout on CPU processes over gloo, in fp32. Packs with images, videos and text-only conversations
go through Megatron's own schedules, forward and backward, and logits, loss and every parameter's gradient (gathered to
full tensors, in transformers' names) are compared with transformers, run conversation by conversation. The figures are
the largest norm of a difference over the norm of transformers' result, over all variants of the row; each must be
below {TOLERANCE:.0e}, for models with linear attention below {DELTA_RULE:.0e}. Of those transformers runs the recurrent
rule, token by token: the gradients of its chunked rule are less exact.

A row is run without recomputation, with full and with selective recomputation, each with and without multi-token
prediction, each with tied and with untied embeddings: twelve variants (on four and eight processes the six of them
that hold every pair), and where context parallelism does not cut them two more with padded `[B, S]` batches. Rows with
"some variants" repeat a combination in other sizes or splits; they are run plain, with blockwise recomputation,
multi-token prediction and tied embeddings together, and padded. The rows of Qwen3.5 are run plain and with the latter
three together, and ten or nine of them in one more variant, which gives every pair of dimensions. An empty cell is a
size of one; `stages` is Megatron's pipeline layout string (an `m` is put before the `L` for multi-token prediction).

The losses of the router (load balancing and z) are compared with their formulas in every row with experts, plain
(`tests/functional/test_router_loss.py`).

Any combination of dimensions that is no row here is rejected at start, unless `--allow-unverified` names it;
sizes beyond these are arithmetic.

Made by `make test-layouts`:

{dates}

{sections}
"""


def main() -> int:
    """Run, and write the page unless `--check`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="leave docs/layouts.md as it is")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which sections (all)")
    arguments = parser.parse_args()
    start = time.monotonic()
    # Two at once: while one compares, the other's workers run.
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        results = dict(zip(arguments.kinds, processes.map(measure, arguments.kinds), strict=True))
    failures = [failure for _, found, _ in results.values() for failure in found]
    count = sum(runs for _, _, runs in results.values())
    print(f"{count} runs, {time.monotonic() - start:.0f} s, {len(failures)} failures")
    print("\n".join(failures), file=sys.stderr)
    if not arguments.check and not failures:
        measured = {kind: (lines, made(kind, runs)) for kind, (lines, _, runs) in results.items()}
        sections = {kind: measured[kind] if kind in measured else on_the_page(kind) for kind in KINDS}
        _, heading, section = PAGE.read_text().partition(TE_HEADING)
        PAGE.write_text(f"{page(sections)}\n{heading}{section}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
