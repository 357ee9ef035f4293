"""Numbers that a smaller dtype cannot hold: refused on the way into it, and nothing else is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.hf.fp8 import SCALE
from megatron_vlbridge.checkpoint.stream.raw import Stored, as_bytes, gather_into
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Piece, Region, TensorSpec
from tests.unit import test_convert, test_fp8
from tests.unit.test_convert import rewrite, tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

GATE = "model.language_model.layers.1.mlp.gate_proj.weight"
FC1 = "language_model.decoder.layers.mlp.linear_fc1.weight"
REFUSED = r"expected values that float16 holds \(up to 65504\), found {}\. Use another dtype"


def make(folder: Path, value: float) -> Path:
    """A bfloat16 checkpoint of ordinary numbers, but one of this value."""
    source = test_convert.make(folder)

    def change(found: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(0)
        for tensor in found.values():
            tensor.normal_()
        found[GATE][3, 5] = value

    rewrite(source, change)
    return source


@pytest.mark.parametrize("value", [1e30, -1e30, 65536.0])
def test_an_import_to_float16_refuses_what_it_cannot_hold(tmp_path, value):
    found = torch.tensor(value).bfloat16().item()
    with pytest.raises(VLBridgeError, match=f"{GATE}: " + REFUSED.format(f"{found:g}".replace("+", r"\+"))):
        import_checkpoint(make(tmp_path / "hf", value), tmp_path / "megatron", dtype="float16")
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["hf"]


def test_an_export_to_float16_refuses_what_it_cannot_hold(tmp_path):
    imported = import_checkpoint(make(tmp_path / "hf", 1e30), tmp_path / "megatron")
    with pytest.raises(VLBridgeError, match=f"{FC1}.*" + REFUSED.format(r"1\.\d*e\+30")):
        export_checkpoint(imported, tmp_path / "back", dtype="float16")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 65280.0, 1e-30])
def test_all_else_becomes_what_torch_makes_of_it(tmp_path, value):
    """Also what was no number before, and what float16 rounds to zero."""
    source = make(tmp_path / "hf", value)
    imported = import_checkpoint(source, tmp_path / "megatron", dtype="float16")
    direct = export_checkpoint(import_checkpoint(source, tmp_path / "same"), tmp_path / "direct", dtype="float16")
    for folder in (export_checkpoint(imported, tmp_path / "back"), direct):
        test_convert.assert_same_bits(tensors(folder), {name: x.half() for name, x in tensors(source).items()})


def test_scales_of_8_bit_weights_may_be_too_large(tmp_path):
    test_fp8.make(tmp_path / "hf", "dense")
    path = next(p for p in (tmp_path / "hf").glob("*.safetensors") if GATE + SCALE in load_file(p))
    found = load_file(path)
    found[GATE + SCALE].fill_(1000.0)
    save_file(found, path)
    with pytest.raises(VLBridgeError, match=f"{GATE}: " + REFUSED.format("-?[0-9.e+]+")):
        import_checkpoint(tmp_path / "hf", tmp_path / "megatron", dtype="float16")
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron", dtype="bfloat16")


def test_float32_holds_more_than_bfloat16(tmp_path):
    source = test_convert.make(
        tmp_path / "hf", dtype=torch.float32, fill=lambda shape, kind: torch.ones(shape, dtype=kind)
    )
    largest = torch.finfo(torch.float32).max
    rewrite(source, lambda found: found[GATE][3].fill_(largest))
    with pytest.raises(VLBridgeError, match=rf"{GATE}: expected values that bfloat16 holds .*found 3\.40282e\+38"):
        import_checkpoint(source, tmp_path / "megatron", dtype="bfloat16")
    imported = import_checkpoint(source, tmp_path / "megatron")
    with pytest.raises(VLBridgeError, match=rf"{FC1}.*expected values that bfloat16 holds .*found 3\.40282e\+38"):
        export_checkpoint(imported, tmp_path / "back", dtype="bfloat16")
    assert tensors(export_checkpoint(imported, tmp_path / "same"))[GATE][3, 5] == largest


def test_the_larger_dtypes_are_not_asked(tmp_path):
    source = make(tmp_path / "hf", 1e30)
    for dtype in ("bfloat16", "float32"):
        folder = export_checkpoint(import_checkpoint(source, tmp_path / f"m-{dtype}", dtype=dtype), tmp_path / dtype)
        assert tensors(folder)[GATE][3, 5].float() == torch.tensor(1e30).bfloat16().float()


@pytest.mark.parametrize("place", [0, 12_345, 2**21 - 1])
@pytest.mark.parametrize("turned", [False, True])
def test_one_number_among_millions_is_found(tmp_path, place, turned):
    """Beside others that were infinite before."""
    numbers = torch.ones(2**10, 2**11)
    numbers.view(-1)[place - 1] = float("inf")
    numbers.view(-1)[place] = -70000.0
    path = tmp_path / "numbers"
    path.write_bytes(as_bytes(numbers))
    stored = Stored(path, 0, TensorSpec(tuple(numbers.shape), numbers.dtype))
    whole = Region.whole("x", tuple(numbers.shape))
    out = torch.empty(numbers.shape[::-1] if turned else numbers.shape, dtype=torch.float16)
    piece = Piece(whole, Region.whole("out", tuple(out.shape)), turned)
    with pytest.raises(VLBridgeError, match="x: " + REFUSED.format("-70000")):
        gather_into(out, [piece], lambda region, part: stored.read_into(region.offset, part), {"x": stored.spec})
