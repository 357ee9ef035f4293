"""Faults in what the kernels are called with are found: by the comparison with transformers, or before it."""

from pathlib import Path
from typing import Any

import pytest

from tests import reference
from tests.functional import matrix
from tests.functional.parity import PACK_LENGTH, compare
from tests.functional.pool import Layout, Pool
from tests.te import mutants

# An image, a video, and text, in one pack.
GROUPS = matrix.groups()[3:]

DIFFERENT = r"the worst: \["
ONE, CP = Layout(), Layout(cp=2, world=2)

# Mutant -> kind of model, layout, how it is found.
FAULTS: dict[str, tuple[str, Layout, str]] = {
    "max_seqlen": ("dense", ONE, "max_seqlen is"),
    "cu_seqlens in int64": ("dense", ONE, "must both be in dtype torch.int32"),
    "one segment": ("dense", ONE, DIFFERENT),
    "a token of each segment is padding": ("dense", ONE, "losses differ"),
    "causal tower": ("dense", ONE, DIFFERENT),
    "bidirectional text": ("dense", ONE, DIFFERENT),
    "heads of keys in another order": ("dense", ONE, DIFFERENT),
    "no segments": ("dense", ONE, "cu_seqlens_q and cu_seqlens_kv can not be None"),
    "qkv_format": ("dense", ONE, "Queries, keys and values must be 4D tensors"),
    "padded and unpadded exchanged": ("dense", CP, "a segment of|segments end at|shape"),
    "padded and unpadded exchanged backward": ("dense", CP, "a segment of|segments end at|shape"),
    "one head of keys": ("dense", ONE, DIFFERENT),
    "scale": ("dense", ONE, DIFFERENT),
    "scale backward": ("dense", ONE, DIFFERENT),
    "window": ("dense", ONE, r"\(16, 0\)"),
    "dropout": ("dense", ONE, r"no reference for .*0\.1\)"),
    "softmax": ("dense", ONE, "no reference for .*NVTE_OFF_BY_ONE_SOFTMAX"),
    "layout": ("dense", ONE, "no reference for .*NVTE_SBHD_SBHD_SBHD"),
    "mask": ("dense", ONE, "no reference for NVTE_CAUSAL_MASK"),
    "eps of the tower": ("dense", ONE, DIFFERENT),
    "eps of the language model": ("dense", ONE, DIFFERENT),
    "zero-centered gamma": ("dense", ONE, DIFFERENT),
    "missing bias": ("dense", ONE, DIFFERENT),
    "gradient of the bias": ("dense", ONE, DIFFERENT),
    "tokens of another expert": ("experts", ONE, "torch.Size"),
    "weights of another expert": ("experts", ONE, DIFFERENT),
    "state across segments": ("linear", ONE, DIFFERENT),
    "convolution across segments": ("linear", ONE, DIFFERENT),
    "tokens of no segment": ("linear", ONE, "segments .* of 128 tokens"),
    "no activation": ("linear", ONE, "AssertionError"),
    "norm in the kernel": ("linear", ONE, "AssertionError"),
    "one expert for all": ("experts", ONE, DIFFERENT),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "dense": reference.write_checkpoint(folder / "dense"),
        "experts": reference.write_checkpoint(folder / "experts", experts={}),
        "linear": reference.write_checkpoint(folder / "linear", linear={}),
    }


def check(pool: Pool, mutant: str, layout: Layout, folder: Path) -> None:
    packs = [reference.pack(group, PACK_LENGTH) for group in GROUPS]
    arguments: dict[str, Any] = {"folder": folder, "packs": packs, "towers": True}
    if layout == CP:
        # The exchange in which a rank's queries see parts of segments: elsewhere no length is below its room here.
        arguments["cp_comm_type"] = "all_gather"
    compare(pool.run(mutants.run, layout, mutant=mutant, **arguments), layout, folder, GROUPS).check()


@pytest.mark.parametrize("layout", [ONE, CP], ids=str)
def test_without_a_fault_all_is_equal(pool: Pool, folders: dict[str, Path], layout: Layout) -> None:
    check(pool, "none", layout, folders["dense"])


@pytest.mark.parametrize("mutant", FAULTS)
def test_a_fault_is_found(pool: Pool, folders: dict[str, Path], mutant: str) -> None:
    kind, layout, how = FAULTS[mutant]
    with pytest.raises(AssertionError, match=how):
        check(pool, mutant, layout, folders[kind])


def test_every_mutant_is_tested() -> None:
    assert mutants.MUTANTS.keys() - FAULTS.keys() == {"none"}
