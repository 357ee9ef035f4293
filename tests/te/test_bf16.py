"""In bf16 the TE backend is as near to fp32 as transformers in bf16 is."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.families import find
from megatron_vlbridge.families.experts import ExpertForm
from tests import mtp_reference, reference
from tests.closeness import relative_error
from tests.functional import matrix, ranks
from tests.functional.parity import PACK_LENGTH
from tests.functional.pool import Layout, Pool

BF16 = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True}
# Both round after each operation, though not after the same ones: the two errors are of one size, not equal.
FACTOR = 2
# No run in fp32 is as far from another.
LEAST = 1e-4
CASES: list[tuple[str, Layout, dict[str, Any]]] = [
    ("dense", Layout(), {}),
    ("experts", Layout(), {}),
    ("dense-mtp", Layout(), {}),
    ("dense", Layout(tp=2, sp=True, world=2), {}),
    ("linear", Layout(tp=2, world=2), {}),
    ("dense", Layout(cp=2, world=2), {"cp_comm_type": "p2p"}),
    ("dense", Layout(cp=2, world=2), {"cp_comm_type": "a2a"}),
    ("dense", Layout(cp=2, world=2), {"cp_comm_type": "all_gather"}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "dense": reference.write_checkpoint(folder / "dense"),
        "experts": reference.write_checkpoint(folder / "experts", experts={}),
        "linear": reference.write_checkpoint(folder / "linear", linear={}),
        "dense-mtp": mtp_reference.write_mtp_checkpoint(folder / "dense-mtp"),
    }


def transformers(kind: str, folder: Path, dtype: torch.dtype) -> reference.Reference:
    if kind.endswith("mtp"):
        return mtp_reference.run_transformers(folder, matrix.groups(), dtype).main
    return reference.run_transformers(folder, [c for group in matrix.groups() for c in group], dtype)


def together(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All tensors as one vector."""
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])


def name(value: object) -> str | None:
    return "-".join(map(str, value.values())) or "plain" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("kind", "layout", "options"), CASES, ids=name)
def test_bf16_is_as_near_to_fp32_as_transformers(
    pool: Pool, folders: dict[str, Path], kind: str, layout: Layout, options: dict[str, Any]
) -> None:
    """The token losses, and all gradients as one vector."""
    folder, groups = folders[kind], matrix.groups()
    packs = [reference.pack(group, PACK_LENGTH) for group in groups]
    results = pool.run(ranks.forward_backward, layout, folder=folder, packs=packs, **BF16, **options)
    fp32, bf16 = (transformers(kind, folder, dtype) for dtype in (torch.float32, torch.bfloat16))
    lengths = [[len(c.tokens) for c in group] for group in groups]
    rows = zip(ranks.of_packs(results, "losses", layout, lengths), lengths, groups, strict=True)
    losses = torch.cat(
        [row[: sum(of_row)] * torch.cat([c.labels != -100 for c in group]) for row, of_row, group in rows]
    )
    config = read_config(folder)
    table = find(config).table(config, ExpertForm.FUSED_OUT_IN)
    gradients = table.to_hf(ranks.assemble([result["gradients"] for result in results]))
    for what, ours, theirs, exact in (
        ("losses", losses, torch.cat(bf16.losses), torch.cat(fp32.losses)),
        ("gradients", together(gradients), together(bf16.gradients), together(fp32.gradients)),
    ):
        error, bound = relative_error(ours, exact), FACTOR * relative_error(theirs, exact)
        assert LEAST < error < bound, what
