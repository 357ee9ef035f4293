"""Writes docs/parity.md: python -m tests.functional.write_parity."""

# Modules that import Megatron are imported inside the functions: the workers import this file too.
import datetime as dt
import importlib.metadata
import platform
import tempfile
from pathlib import Path

from tests.functional.pool import Layout, Pool

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"


def table(pool: Pool, folder: Path) -> list[str]:
    """The rows of the page: each kind of input on one process."""
    from tests import reference
    from tests.functional.parity import KINDS, measure

    rows = []
    for title, kinds in KINDS.items():
        group = [reference.conversation(kind, seed) for seed, kind in enumerate(kinds, 1)]
        errors = measure(pool, Layout(), folder, [group])
        errors.check()
        name, worst = max(errors.gradients.items(), key=lambda item: item[1])
        figures = (errors.vision, errors.logits, errors.token_losses, errors.loss, worst)
        rows.append(f"| {title} | {' | '.join(f'{x:.1e}' for x in figures)} | `{name}` |")
    return rows


def main() -> None:
    """Measure and write the page."""
    from tests import reference
    from tests.functional.parity import TOLERANCE

    pool = Pool()
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            kind: table(pool, reference.write_checkpoint(Path(folder) / kind, tied=kind == "tied"))
            for kind in ("untied", "tied")
        }
    pool.close()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("megatron-core", "transformers", "torch")
    )
    columns = ("input", "vision tower", "logits", "token losses", "loss", "largest gradient error", "parameter")
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    sections = "\n\n".join(
        f"## {kind.capitalize()} embeddings\n\n{head}\n" + "\n".join(lines) for kind, lines in rows.items()
    )
    PAGE.write_text(
        f"""# Parity with transformers

A tiny random Qwen3-VL in fp32 (4 decoder layers, 4 vision layers, 2 deepstack levels, grouped-query attention), run by
this project as one pack and by transformers conversation by conversation. The values are the norm of the difference
over the norm of transformers' result, for the output of the vision tower (tokens and deepstack features), the logits,
the token losses, the mean loss, and the gradient of the parameter with the largest error. The tests require less than
{TOLERANCE:.0e}. The same comparison for every layout is in [layouts.md](layouts.md).

Measured by `.venv/bin/python -m tests.functional.write_parity` on {dt.date.today()}, {platform.machine()} CPU,
{versions}.

{sections}
"""
    )
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
