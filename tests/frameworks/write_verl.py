"""Writes the table of verl's own code in docs/frameworks.md: python -m tests.frameworks.write_verl."""

import os

# Before torch is imported, as in the tests.
os.environ["OMP_NUM_THREADS"] = "1"

import tempfile
from pathlib import Path

from tests import reference
from tests.frameworks.test_verl import DENSE, EXPERTS, FORMS, measure
from tests.functional.pool import Layout, Pool
from tests.functional.test_calls import assert_small
from tests.functional.write_calls import measured_with, table, write_block


def cell(pool: Pool, layout: Layout, folder: Path, form: str) -> str:
    """The error of the log-probs, and the largest of a gradient; all are within the tolerance of the tests."""
    error = measure(pool, layout, folder, form)
    assert_small(error, folder)
    return f"{error.pop('token losses'):.1e}, {max(error.values()):.1e}"


def main() -> None:
    """Measure and write the table."""
    pool, rows = Pool(), []
    with tempfile.TemporaryDirectory() as where:
        dense = reference.write_checkpoint(Path(where, "dense"))
        experts = reference.write_checkpoint(Path(where, "experts"), experts={})
        models = [(layout, dense, "") for layout in DENSE] + [(layout, experts, " experts") for layout in EXPERTS]
        for layout, folder, name in models:
            rows.append(f"| {layout}{name} | {' | '.join(cell(pool, layout, folder, form) for form in FORMS)} |")
            print(rows[-1], flush=True)
    pool.close()
    columns = [f"`{name}`, {form}" for name, form in COLUMNS]
    write_block(
        "verl",
        f"""\
verl's own functions on a model that its `make_megatron_module` builds through mbridge's `AutoBridge`: one training
step of two micro-batches, with the models, conversations and measures of the table below. Measured by
`.venv-frameworks/bin/python -m tests.frameworks.write_verl` on {measured_with("verl", "mbridge")}.

{table(columns, rows)}""",
    )


COLUMNS = [
    ("gptmodel_forward_model_engine", "thd"),
    ("gptmodel_forward_model_engine", "bshd"),
    ("model_forward_gen", "thd"),
]


if __name__ == "__main__":
    main()
