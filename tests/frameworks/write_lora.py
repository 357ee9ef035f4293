"""Writes the table of docs/lora.md: python -m tests.frameworks.write_lora."""

# Modules that import Megatron are imported inside the functions: the workers import this file too.
import datetime as dt
import importlib.metadata
import platform
import re
import tempfile
from pathlib import Path

import torch

from tests.functional.pool import Pool

PAGE = Path(__file__).parents[2] / "docs" / "lora.md"
NAMES = {"dense": "Qwen3-VL", "experts": "Qwen3-VL-MoE", "linear": "Qwen3.5", "linear-experts": "Qwen3.5-MoE"}


def rows(pool: Pool, where: Path) -> list[str]:
    """A row for each layout: of each kind of model the largest errors of logits and of a gradient."""
    from tests.frameworks.lora_figures import make_case, measure
    from tests.frameworks.test_lora import EP2, LAYOUTS, TARGETS, TP2_EP2

    cases = {kind: make_case(where / kind, kind, TARGETS[kind]) for kind in NAMES}
    found = []
    for layout in [*LAYOUTS, EP2, TP2_EP2]:
        cells = []
        for kind, case in cases.items():
            if layout.ep > 1 and "experts" not in kind:
                cells.append("")
                continue
            errors = measure(pool, layout, case)
            worst = errors.gradients[errors.worst]
            assert max(errors.logits, worst) < case.bound, (kind, layout, errors.worst)
            cells.append(f"{errors.logits:.1e}, {worst:.1e}")
        found.append(f"| {layout} | {' | '.join(cells)} |")
        print(found[-1], flush=True)
    return found


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    pool = Pool()
    with tempfile.TemporaryDirectory() as where:
        found = rows(pool, Path(where))
    pool.close()
    packages = ("megatron-core", "transformers", "peft", "torch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    table = "\n".join([f"| layout | {' | '.join(NAMES.values())} |", f"|{'---|' * (len(NAMES) + 1)}", *found])
    text = f"""<!-- lora -->
One training step of tiny random models in fp32 with text, images and a video, against `peft` on transformers run
conversation by conversation: the norm of the difference over the norm of `peft`'s result, of the logits of the
conversation and of the gradient of the A or B with the largest error. Adapters: all projections of the decoder layers
(Qwen3-VL-MoE: attention and experts), of Qwen3-VL also those of the vision tower. Measured by
`.venv-frameworks/bin/python -m tests.frameworks.write_lora` on {dt.date.today()}, {platform.machine()} CPU,
{versions}.

{table}
<!-- end of lora -->"""
    page = PAGE.read_text()
    PAGE.write_text(re.sub("<!-- lora -->.*<!-- end of lora -->", lambda _: text, page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
