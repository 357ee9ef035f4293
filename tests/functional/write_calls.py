"""Writes the table of docs/frameworks.md: python -m tests.functional.write_calls."""

# Modules that import Megatron are imported inside the functions: the workers import this file too.
import datetime as dt
import importlib.metadata
import platform
import re
import tempfile
from pathlib import Path

import torch

from tests.functional.pool import Layout, Pool

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
LAYOUTS = [
    Layout(),
    Layout(tp=2, world=2),
    Layout(tp=2, sp=True, world=2),
    Layout(cp=2, world=2),
    Layout(pp=2, world=2),
    Layout(tp=2, sp=True, cp=2, world=4),
    Layout(tp=2, sp=True, pp=2, world=4),
    Layout(pp=2, cp=2, world=4),
]
EP2 = Layout(ep=2, world=2)
NAMES = {
    "verl_thd": "verl `thd`",
    "verl_bshd": "verl `bshd`",
    "verl_fused": "verl fused",
    "slime": "slime",
    "miles": "miles",
    "nemo_rl": "NeMo-RL",
    "sky_rl": "SkyRL",
    "roll": "ROLL",
    "areal": "AReaL",
    "megatron_bridge": "Megatron-Bridge",
}


def cell(pool: Pool, folder: Path, layout: Layout, name: str) -> str:
    """The largest error of the token losses, and of the gradients."""
    if name == "areal" and layout.cp > 1:
        return "none"  # it has no context parallelism with images
    from tests.functional import call_ranks
    from tests.functional.test_calls import assert_small, conversations, errors

    found = pool.run(call_ranks.run, layout, folder=folder, name=name, conversations=conversations(name))
    error = errors(found, folder, copies=layout.dp, name=name)
    assert_small(error, folder)
    return f"{error.pop('token losses'):.1e}, {max(error.values()):.1e}"


def main() -> None:
    """Measure and write the table."""
    from tests import reference

    torch.set_num_threads(1)
    pool, rows = Pool(), []
    with tempfile.TemporaryDirectory() as where:
        dense = reference.write_checkpoint(Path(where, "dense"))
        experts = reference.write_checkpoint(Path(where, "experts"), experts={})
        for layout in [*LAYOUTS, EP2]:
            cells = [cell(pool, experts if layout.ep > 1 else dense, layout, name) for name in NAMES]
            rows.append(f"| {layout} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    pool.close()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("megatron-core", "transformers", "torch")
    )
    table = "\n".join([f"| layout | {' | '.join(NAMES.values())} |", f"|{'---|' * (len(NAMES) + 1)}", *rows])
    text = f"""<!-- calls -->
One training step of tiny random models in fp32 with text, images and a video, against transformers run conversation by
conversation: the norm of the difference over the norm of transformers' result, of the token losses (which are minus the
log-probs of the labels), and of the gradient of the parameter with the largest error. Qwen3-VL, with EP Qwen3-VL-MoE.
Measured by `.venv/bin/python -m tests.functional.write_calls` on {dt.date.today()}, {platform.machine()} CPU,
{versions}.

{table}
<!-- end of calls -->"""
    page = PAGE.read_text()
    PAGE.write_text(re.sub("<!-- calls -->.*<!-- end of calls -->", lambda _: text, page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
