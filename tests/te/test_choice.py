"""Which attention Transformer Engine chooses for a Qwen3-VL's packs: the reasons for what the guards refuse.

Its own choice, without an admission of fp32; cuDNN is taken to support everything.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import reference
from tests.te import choice
from tests.te.host import Worker, results

TEXT = {"head_dim_qk": 128, "head_dim_v": 128, "num_gqa_groups": 8, "attn_mask_type": "padding_causal"}
TOWER = {"head_dim_qk": 72, "head_dim_v": 72, "attn_mask_type": "padding"}
AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)

Choose = Callable[..., str]
Called = Callable[..., set[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def choose() -> Iterator[Choose]:
    process = Worker("te")

    def in_process(capability: tuple[int, int], **parameters: Any) -> str:
        process.begin(choice.choose, capability, parameters)
        return results([process])[0]

    yield in_process
    process.kill()


@pytest.fixture
def called() -> Iterator[Called]:
    process = Worker("te")

    def in_process(*args: object) -> set[str]:
        process.begin(choice.called, *args)
        return results([process])[0]

    yield in_process
    process.kill()


@pytest.mark.parametrize("shape", [TEXT, TOWER, TOWER | {"head_dim_qk": 64, "head_dim_v": 64}])
@pytest.mark.parametrize("capability", [AMPERE, HOPPER, BLACKWELL])
def test_bf16_goes_to_cudnn_and_fp32_to_torch(
    choose: Choose, capability: tuple[int, int], shape: dict[str, Any]
) -> None:
    assert choose(capability, **shape) == "fused"
    assert choose(capability, **shape, qkv_dtype=torch.float32) == "unfused"


@pytest.mark.parametrize("exchange", ["p2p", "a2a", "all_gather"])
def test_over_context_parallel_ranks_fp32_has_no_attention(choose: Choose, exchange: str) -> None:
    ranks = {"context_parallel": True, "cp_comm_type": exchange, "cp_size": 2}
    assert choose(HOPPER, **TEXT, **ranks) == "fused"
    assert choose(HOPPER, **TEXT, **ranks, qkv_dtype=torch.float32) == "none"


def test_deterministic_attention_is_not_cudnns_in_all_sizes(choose: Choose) -> None:
    small, large = {"batch_size": 16, "max_seqlen_q": 1024, "max_seqlen_kv": 1024}, {"max_seqlen_q": 8192}
    large |= {"max_seqlen_kv": 8192}
    assert 16 * large["max_seqlen_q"] ** 2 == 2**30
    for sizes, found in ((small, "fused"), (large, "unfused")):
        assert choose(HOPPER, **TEXT, **sizes) == "fused"
        assert choose(HOPPER, **TEXT, **sizes, deterministic=True) == found
    assert choose(HOPPER, **TEXT, **large, deterministic=True, context_parallel=True, cp_size=2) == "none"
    assert choose(AMPERE, **TEXT, **small, deterministic=True) == "unfused"


def test_flash_attention_is_preferred_before_sm90(choose: Choose) -> None:
    assert choose(AMPERE, **TEXT, flash=True) == "flash"
    assert choose(HOPPER, **TEXT, flash=True) == "fused"
    assert choose(AMPERE, **TEXT, flash=True, qkv_dtype=torch.float32) == "unfused"


@pytest.mark.parametrize("chosen", ["fused", "unfused"])
def test_the_attention_that_a_user_chooses_is_the_one_that_runs(
    called: Called, folder: Path, tmp_path: Path, chosen: str
) -> None:
    """In bf16, of both TE's functions for it are called; the other one's are not."""
    found = called(folder, chosen, tmp_path / "store")
    fused, unfused = {"fused_attn_fwd", "fused_attn_bwd"}, {"convert_thd_to_bshd", "convert_bshd_to_thd"}
    expected, other = (fused, unfused) if chosen == "fused" else (unfused, fused)
    assert expected <= found
    assert not other & found


@pytest.mark.parametrize("name", ["NVTE_FUSED_ATTN", "NVTE_FLASH_ATTN", "NVTE_UNFUSED_ATTN"])
def test_a_variable_against_the_chosen_attention_fails_when_the_model_is_made(
    called: Called, folder: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(AssertionError, match=f"{name} set to 0, but expected 1 for attention backend type auto"):
        called(folder, "auto", tmp_path / "store", {name: "0"})
