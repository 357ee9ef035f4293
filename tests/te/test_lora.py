"""Adapters beside Transformer Engine's layers, which hold the norm before them or several experts."""

from pathlib import Path

import pytest

from tests.functional.kinds import Variant
from tests.functional.pool import Layout, Pool
from tests.functional.test_lora import FUSED, Folders, check

TP2_SP = Layout(tp=2, sp=True, world=2)
CASES = [
    ("dense", Layout(), Variant(), None),
    ("dense", TP2_SP, Variant("uniform"), ["q_proj", "v_proj", "o_proj", "down_proj", "attn.qkv"]),
    ("experts", Layout(ep=2, world=2), Variant(), None),
    ("experts", Layout(tp=2, sp=True, etp=2, world=2), Variant("selective"), FUSED),
    ("linear-experts", Layout(), Variant(mtp=True, tied=True), None),
]


@pytest.mark.parametrize(("kind", "layout", "variant", "targets"), CASES, ids=str)
def test_logits_and_gradients_are_those_of_transformers(
    pool: Pool, tmp_path: Path, kind: str, layout: Layout, variant: Variant, targets: list[str] | None
) -> None:
    check(pool, Folders(tmp_path), kind, layout, variant, targets)
