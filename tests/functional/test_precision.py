"""What a checkpoint holds in float32 stays so in a bf16 model, through training and back to Hugging Face."""

from pathlib import Path

import pytest
import torch

from megatron_vlbridge.checkpoint.convert import import_checkpoint
from tests import reference
from tests.functional import precision_ranks
from tests.functional.parity import PACK_LENGTH
from tests.functional.pool import Layout, Pool
from tests.functional.test_live import rewritten, same, weights_of

LR = 1e-5
FP32 = ("linear_attn.A_log", "linear_attn.norm.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: bfloat16, but for the decay and the norm after linear attention."""
    where = tmp_path_factory.mktemp("precision")
    source = reference.write_checkpoint(where / "fp32", linear={})
    return rewritten(source, where / "hf", lambda name, x: {name: x if name.endswith(FP32) else x.bfloat16()})


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("layout", [Layout(tp=2, world=2), Layout(world=2)], ids=str)
def test_float32_weights_are_trained_and_exported_in_float32(
    pool: Pool, folder: Path, layout: Layout, distributed: bool
) -> None:
    conversations = [reference.conversation(kind, seed) for kind, seed in (("mixed", 2), ("text", 3), ("image", 4))]
    pack = reference.pack(conversations, PACK_LENGTH)
    source = weights_of(folder)
    for result in pool.run(
        precision_ranks.train_in_bf16, layout, folder=folder, pack=pack, lr=LR, distributed=distributed
    ):
        layers = [f"language_model.decoder.layers.{layer}.self_attention" for layer in range(3)]
        assert result["fp32"] == {f"{layer}.{part}" for layer in layers for part in ("A_log", "out_norm.weight")}
        assert same(dict(result["before"]), source)
        after = dict(result["after"])
        assert all(after[name].dtype == x.dtype for name, x in source.items())
        for name in (name for name in source if name.endswith(FP32)):
            # Adam's first step is `lr` for every element, less than half of what bf16 can tell apart near one.
            step = (after[name] - source[name]).abs()
            assert torch.allclose(step, torch.full_like(step, LR), rtol=0.02), name


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, world=2)], ids=str)
def test_bfloat16_weights_become_float32_with_the_same_values(
    pool: Pool, folder: Path, tmp_path: Path, layout: Layout
) -> None:
    """Of a file that holds all weights in bfloat16; filled by slices, and by Megatron's loader from an import."""
    source = rewritten(folder, tmp_path / "hf", lambda name, x: {name: x.bfloat16()})
    import_checkpoint(source, tmp_path / "megatron")
    expected = {name: x.float() if name.endswith(FP32) else x for name, x in weights_of(source).items()}
    for result in pool.run(precision_ranks.fill_in_bf16, layout, folder=source, checkpoint=tmp_path / "megatron"):
        assert same(dict(result["filled"]), expected)
        assert same(dict(result["loaded"]), expected)
