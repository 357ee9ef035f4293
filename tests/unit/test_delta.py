"""What an adapter adds to some rows of a weight has the bits of the same rows of the whole sum."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_vlbridge.checkpoint.peft.adapter import LoraPair
from megatron_vlbridge.checkpoint.peft.delta import Delta
from megatron_vlbridge.checkpoint.stream.raw import Stored
from megatron_vlbridge.weights import Region, RuleTable, TensorSpec


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(1, 5, 2), (63, 70, 3), (128, 33, 1), (513, 64, 3), (200, 8, 70)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_rows_of_a_weight_are_those_of_the_whole_sum(
    tmp_path: Path, rows: int, columns: int, rank: int, dtype: torch.dtype
) -> None:
    a, b = torch.randn(rank, columns).double(), torch.randn(rows, rank).double()
    save_file({"a": a, "b": b}, tmp_path / "file")
    start = (tmp_path / "file").stat().st_size - a.nbytes - b.nbytes
    stored = [
        Stored(tmp_path / "file", start + before, TensorSpec(tuple(x.shape), x.dtype))
        for before, x in ((0, a), (a.nbytes, b))
    ]
    added = Delta({"w": LoraPair(*stored, 0.7, None, False)}, RuleTable([]), RuleTable([]))
    weight = torch.randn(rows, columns).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (weight.to(wide) + b.to(wide) @ a.to(wide) * 0.7).to(dtype)
    for first in range(0, rows, 17):
        for count in (1, 16, 100, rows):
            part = weight[first : first + count].clone()
            added.add_into(Region("w", (first, 0), tuple(part.shape)), part)
            assert torch.equal(part, expected[first : first + count]), (first, count)
