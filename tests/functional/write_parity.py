"""Writes docs/parity.md: python -m tests.functional.write_parity."""

# Modules that import Megatron are imported inside the functions: the workers import this file too.
import datetime as dt
import importlib.metadata
import math
import platform
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.functional.kinds import KINDS
from tests.functional.pool import Layout, Pool

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
# With multi-token prediction, with tied embeddings.
VARIANTS = {"untied embeddings": (False, False), "tied embeddings": (False, True), "an MTP layer": (True, False)}
COLUMNS = ("input", "vision tower", "logits", "token losses", "loss", "largest gradient error", "parameter")
PARTS = ("A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight", "conv1d.weight")


def table(pool: Pool, folder: Path) -> str:
    """Each kind of input on one process."""
    from tests import reference
    from tests.functional.parity import KINDS as INPUTS
    from tests.functional.parity import measure

    rows = []
    for title, kinds in INPUTS.items():
        group = [reference.conversation(kind, seed) for seed, kind in enumerate(kinds, 1)]
        errors = measure(pool, Layout(), folder, [group])
        errors.check()
        name, worst = max(errors.gradients.items(), key=lambda item: item[1])
        figures = (errors.vision, errors.logits, errors.token_losses, errors.loss, worst)
        rows.append(f"| {title} | {' | '.join(f'{x:.1e}' for x in figures)} | `{name}` |")
        print(folder.name, rows[-1], flush=True)
    return markdown(COLUMNS, rows)


def rules(pool: Pool, folder: Path) -> str:
    """The gradients of linear attention's parameters, with decays eight times as strong, against both rules."""
    from tests import reference
    from tests.closeness import relative_error
    from tests.functional.parity import KINDS as INPUTS
    from tests.functional.parity import measure

    # A folder of its own: transformers' results are cached by the path.
    folder = Path(shutil.copytree(folder, folder.with_name("strong-decay")))
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        forgetful = {name: x + math.log(8) for name, x in tensors.items() if name.endswith(".A_log")}
        save_file(tensors | forgetful, file, {"format": "pt"})
    group = [
        reference.conversation(kind, seed) for seed, kind in enumerate(INPUTS["several conversations in one pack"])
    ]
    ours = measure(pool, Layout(), folder, [group]).gradients
    recurrent = reference.run_transformers(folder, group).gradients
    chunked = reference.run_transformers_as_it_is(folder, group, torch.float32).gradients
    between = {name: relative_error(chunked[name], gradient) for name, gradient in recurrent.items()}
    rows = []
    for part in PARTS:
        names = [name for name in ours if name.endswith(f"linear_attn.{part}")]
        rows.append(f"| `{part}` | {max(ours[x] for x in names):.1e} | {max(between[x] for x in names):.1e} |")
    return markdown(("gradient of", "this project", "transformers' chunked rule"), rows)


def markdown(columns: tuple[str, ...], rows: list[str]) -> str:
    """A table."""
    return "\n".join([f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *rows])


def main() -> None:
    """Measure and write the page."""
    from tests.functional import matrix
    from tests.functional.parity import DELTA_RULE, TOLERANCE

    torch.set_num_threads(1)
    pool, sections = Pool(), []
    with tempfile.TemporaryDirectory() as where:
        folders = matrix.write_folders(Path(where), KINDS)
        for kind, entry in KINDS.items():
            sections += [
                f"## {entry.model}, {title}\n\n{table(pool, folders[kind, mtp, tied])}"
                for title, (mtp, tied) in VARIANTS.items()
            ]
        of_rules = rules(pool, folders["linear", False, False])
    pool.close()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("megatron-core", "transformers", "torch")
    )
    text = "\n\n".join(sections)
    PAGE.write_text(
        f"""# Parity with transformers

Tiny random models in fp32 (4 decoder layers, 4 vision layers, grouped-query attention; 2 deepstack levels in Qwen3-VL,
3 layers of linear and one of full attention in Qwen3.5), run by this project as one pack and by transformers
conversation by conversation. The values are the norm of the difference over the norm of transformers' result, for the
output of the vision tower (tokens and deepstack features), the logits, the token losses, the mean loss, and the
gradient of the parameter with the largest error. The tests require less than {TOLERANCE:.0e}, with linear attention
{DELTA_RULE:.0e}. The same comparison for every layout is in [layouts.md](layouts.md).

Measured by `.venv/bin/python -m tests.functional.write_parity` on {dt.date.today()}, {platform.machine()} CPU,
{versions}.

{text}

## The rules of linear attention

transformers computes the gated delta rule token by token (recurrent) or, by default, in chunks. Its chunked rule takes
differences of one running sum of log decays, which cancel in the backward; the recurrent rule is the reference of this
project's tests. The largest relative distances from its gradients, of several conversations in one pack, in Qwen3.5
with decays `exp(A_log)` up to 16, as transformers initializes them (above they are up to 2):

{of_rules}
"""
    )


if __name__ == "__main__":
    main()
