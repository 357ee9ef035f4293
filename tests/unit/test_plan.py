"""The plan: what fits is accepted, and every kind of mismatch is named, all at once."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlbridge import read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import ExpertForm, find
from megatron_vlbridge.weights import Copy, Plan, Region, RuleTable, TensorSpec, gate_up
from megatron_vlbridge.weights.plan import MismatchError
from megatron_vlbridge.weights.regions import check_exact_cover

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
RULES = RuleTable(
    [
        Copy("embed", "embedding", (10, 4), padded_rows=True),
        gate_up("gate", "up", "fc1", 6, (4,), layer=0),
        Copy("norm", "final", (4,)),
    ]
)


def tables(dtype=torch.bfloat16):
    hf = {name: TensorSpec(shape, dtype) for name, shape in RULES.hf_shapes.items()}
    return hf, {name: TensorSpec(shape, dtype) for name, shape in RULES.megatron_shapes.items()}


def test_what_fits_is_accepted_and_measured():
    plan = Plan(RULES, *tables())
    assert plan.notes == []
    assert sum(spec.nbytes for spec in plan.hf.values()) == 2 * (10 * 4 + 2 * 6 * 4 + 4)


def test_all_mismatches_are_listed_at_once():
    hf, megatron = tables()
    del hf["up"]
    hf["stray"] = TensorSpec((3,), torch.float32)
    hf["norm"] = TensorSpec((5,), torch.bfloat16)
    megatron["fc1"] = TensorSpec((1, 13, 4), torch.bfloat16)
    megatron["embedding"] = TensorSpec((10, 4), torch.float32)
    with pytest.raises(VLBridgeError) as caught:
        Plan(RULES, hf, megatron, hf_source="folder A", megatron_source="folder B")
    message = str(caught.value)
    for part in (
        "folder A",
        "folder B",
        "5 places",
        "missing Hugging Face tensors (1)",
        "up: expected [6, 4]",
        "extra Hugging Face tensors (1)",
        "stray: [3] float32",
        "norm: expected [4], found [5]",
        "fc1: expected [1, 12, 4], found [1, 13, 4]",
        "embed is torch.bfloat16, embedding is torch.float32",
    ):
        assert part in message, part


def test_long_lists_are_shortened_with_their_count_and_the_error_holds_all():
    hf, megatron = tables()
    names = [f"stray{number:02}" for number in range(20)]
    hf |= {name: TensorSpec((1,), torch.int8) for name in names}
    del hf["up"]
    with pytest.raises(VLBridgeError, match=r"extra Hugging Face tensors \(20\)[\s\S]*and 12 more") as caught:
        Plan(RULES, hf, megatron)
    assert isinstance(caught.value, MismatchError)
    assert caught.value.mismatches == {
        "missing Hugging Face tensors": ["up: expected [6, 4]"],
        "extra Hugging Face tensors": [f"{name}: [1] int8, expected none of this name" for name in names],
    }
    assert "stray19" not in str(caught.value)
    assert str(caught.value).endswith("All 21 are listed with --json, and in the error's mismatches.")


def test_an_error_that_shows_all_speaks_of_no_other_list():
    hf, megatron = tables()
    del hf["up"]
    with pytest.raises(MismatchError) as caught:
        Plan(RULES, hf, megatron)
    assert "--json" not in str(caught.value)


def test_the_error_passes_between_processes_whole():
    error = MismatchError("text", {"kind": ["line"]})
    other = pickle.loads(pickle.dumps(error))
    assert (type(other), str(other), other.mismatches) == (MismatchError, "text", {"kind": ["line"]})


def test_padded_vocabulary_rows_are_accepted_and_noted():
    hf, megatron = tables()
    megatron["embedding"] = TensorSpec((16, 4), torch.bfloat16)
    plan = Plan(RULES, hf, megatron)
    assert plan.notes == ["embedding: 6 rows of padding after the 10 of the vocabulary"]


@pytest.mark.parametrize("shape", [(9, 4), (16, 5), (16, 4, 1)])
def test_other_shapes_are_no_padding(shape):
    hf, megatron = tables()
    megatron["embedding"] = TensorSpec(shape, torch.bfloat16)
    with pytest.raises(VLBridgeError, match="embedding: expected"):
        Plan(RULES, hf, megatron)


def test_only_the_vocabulary_may_be_padded():
    hf, megatron = tables()
    megatron["final"] = TensorSpec((8,), torch.bfloat16)
    with pytest.raises(VLBridgeError, match="final: expected"):
        Plan(RULES, hf, megatron)


def test_dtypes_may_differ_only_where_that_is_asked_for():
    hf, _ = tables(torch.bfloat16)
    _, megatron = tables(torch.float32)
    with pytest.raises(VLBridgeError, match="dtypes that differ"):
        Plan(RULES, hf, megatron)
    Plan(RULES, hf, megatron, cast=True)


def test_rules_that_move_something_twice_are_refused():
    table = RuleTable([Copy("a", "x", (4,)), Copy("b", "x", (4,))])
    hf = {name: TensorSpec((4,), torch.int8) for name in "ab"}
    with pytest.raises(VLBridgeError, match="not covered exactly once"):
        Plan(table, hf, {"x": TensorSpec((4,), torch.int8)})


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_exact_cover_agrees_with_counting_every_number(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    regions = []
    for _ in range(data.draw(st.integers(0, 5))):
        offset = tuple(data.draw(st.integers(0, extent - 1)) for extent in shape)
        size = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
        regions.append(Region("x", offset, size))
    if data.draw(st.booleans()):  # the numbers left over, so that exact covers occur too
        counts = count(regions, shape)
        regions += [Region("x", tuple(i.tolist()), (1,) * len(shape)) for i in (counts == 0).nonzero()]
    exact = bool((count(regions, shape) == 1).all())
    if exact:
        check_exact_cover("x", regions, shape)
    else:
        with pytest.raises(VLBridgeError, match=r"x: .* parts"):
            check_exact_cover("x", regions, shape)


def count(regions, shape) -> torch.Tensor:
    counts = torch.zeros(shape, dtype=torch.int64)
    for region in regions:
        counts[region.slices] += 1
    return counts


@pytest.mark.parametrize("name", ["Qwen3-VL-2B-Instruct", "Qwen3-VL-8B-Instruct", "Qwen3-VL-32B-Instruct"])
def test_published_sizes_have_the_published_number_of_parameters(name):
    config = read_config(CONFIGS / f"{name}.json")
    table = find(config).table(config)
    expected = {"2B": 2_127_532_032, "8B": 8_767_123_696, "32B": 33_357_390_064}[name.split("-")[2]]
    hf = {key: TensorSpec(shape, torch.bfloat16) for key, shape in table.hf_shapes.items()}
    megatron = {key: TensorSpec(shape, torch.bfloat16) for key, shape in table.megatron_shapes.items()}
    Plan(table, hf, megatron)
    assert sum(spec.nbytes for spec in hf.values()) == 2 * expected


def test_only_16_bit_tensors_may_be_part_of_a_tensor_held_as_float32():
    hf, megatron = tables()
    megatron["fc1"] = TensorSpec((1, 12, 4), torch.float32)
    hf["up"] = TensorSpec((6, 4), torch.float32)
    assert "fc1: float32" in Plan(RULES, hf, megatron, upcast=["fc1"]).notes[0]
    for dtype in (torch.float64, torch.float8_e4m3fn):
        hf["gate"] = TensorSpec((6, 4), dtype)
        with pytest.raises(MismatchError, match=r"gate is torch\.float") as caught:
            Plan(RULES, hf, megatron, upcast=["fc1"])
        assert list(caught.value.mismatches) == ["dtypes that differ"]


@pytest.mark.parametrize(
    ("name", "mtp_experts", "tensors", "nbytes"),
    [
        ("27B", None, 1199, 55_562_872_800),
        ("35B-A3B", "per_expert", 1811, 71_903_655_008),
        ("122B-A10B", "per_expert", 1949, 250_173_007_840),
        ("397B-A17B", "per_expert", 2924, 806_795_875_168),
    ],
)
def test_published_qwen3_5_have_the_published_tensors_and_bytes(name, mtp_experts, tensors, nbytes):
    """As `total_size` and `weight_map` of the published `model.safetensors.index.json` say."""
    config = read_config(CONFIGS / f"Qwen3.5-{name}.json")
    table = find(config).table(config, None, mtp_experts and ExpertForm(mtp_experts))
    fp32 = (".linear_attn.A_log", ".linear_attn.norm.weight")
    sizes = {key: math.prod(shape) * (4 if key.endswith(fp32) else 2) for key, shape in table.hf_shapes.items()}
    assert (len(sizes), sum(sizes.values())) == (tensors, nbytes)
