"""Runs every row of the TE backend and writes their section of docs/layouts.md.

Use: .venv-te/bin/python -m tests.te.write_layouts.

Ends with an error where a figure is not within the tolerance. With `--check` the page is left as it is.
"""

# What imports Megatron is imported inside the functions, after the choice of the backend.
import argparse
import datetime as dt
import importlib.metadata
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_vlbridge.backends import cpu_runtime
from tests.functional.kinds import KINDS
from tests.functional.write_layouts import COLUMNS, PAGE
from tests.functional.write_layouts import TE_HEADING as HEADING
from tests.functional.write_layouts import first_cells as cells_of_layout
from tests.te.host import Hosts
from tests.te.pool import Pool


def first_cells(row: Any) -> str:
    """The cells that tell the row from the others."""
    return f"| {KINDS[row.kind].model} {cells_of_layout(row.kind, row.layout)} {row.variant} | {row.setting} |"


def measure() -> tuple[list[str], list[str]]:
    """The table's lines, and what failed."""
    # This process runs no model of Transformer Engine's; its workers do.
    cpu_runtime.enable()
    from tests.functional import matrix
    from tests.te import rows

    torch.set_num_threads(1)  # the workers need the cores
    lines, failures = [], []
    hosts = Hosts()
    pool = Pool("te")
    with tempfile.TemporaryDirectory() as where:
        folders = matrix.write_folders(Path(where), {row.kind for row in rows.ROWS})
        for row in rows.ROWS:
            errors = rows.measure(pool, row, folders)
            if errors.too_large():
                failures.append(f"{row}: {list(errors.too_large().items())[:4]}")
            worst = errors.logits, errors.loss, max(errors.gradients.values())
            lines.append(f"{first_cells(row)} {' | '.join(f'{x:.1e}' for x in worst)} |")
            print(f"{row}: worst gradient {worst[-1]:.1e}", flush=True)
    pool.close()
    hosts.close()
    return lines, failures


def section(lines: list[str]) -> str:
    """The section of the page."""
    names = ["model", *COLUMNS, "variant", "settings", "logits", "loss", "worst gradient"]
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}"
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("transformer_engine", "megatron-core", "transformers", "torch")
    )
    return f"""{HEADING}

The same comparison with the TE backend: Megatron's modules of Transformer Engine and its Python, up to the call of a
kernel with its arguments; the kernels are references in torch, and attention in fp32 takes the way of bf16
([gpu.md](gpu.md)). The rows hold every pair of what the rows above combine, each in one variant. `settings` are further
ones of Megatron's: `p2p`, `a2a` and `all_gather` are exchanges between context-parallel ranks (`cp_comm_type`), four of
them one for each layer. `make test-te` runs as many rows of Qwen3-VL as still hold every pair
and every setting, and a few of Qwen3.5.

{head}
{chr(10).join(lines)}

Made by `.venv-te/bin/python -m tests.te.write_layouts` ({len(lines)} runs) on {dt.date.today()},
{platform.machine()} CPU, {os.cpu_count()} cores, {versions}.
"""


def main() -> int:
    """Run, and write the section unless `--check`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="leave docs/layouts.md as it is")
    arguments = parser.parse_args()
    lines, failures = measure()
    print("\n".join(failures), file=sys.stderr)
    if not arguments.check and not failures:
        before = PAGE.read_text().partition(HEADING)[0]
        PAGE.write_text(f"{before.rstrip()}\n\n{section(lines)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
