"""The rules of layers with experts, in the three forms that Hugging Face checkpoints have."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlbridge import read_config
from megatron_vlbridge.config import Config, MoeConfig, TextConfig, VisionConfig
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import ExpertForm, find
from megatron_vlbridge.weights import Move, Plan, Region, RuleTable, SingleExperts, TensorSpec
from megatron_vlbridge.weights.regions import RegionIndex
from megatron_vlbridge.weights.rules import assemble
from tests.calls import count_calls

SETTINGS = settings(max_examples=25, deadline=None)
FORMS = st.sampled_from(list(ExpertForm))
CONFIGS = Path(__file__).parents[1] / "data" / "configs"
HF_LAYERS, LAYERS = "model.language_model.layers", "language_model.decoder.layers"
FC1, FC2 = "mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight"


def make(experts: int, hidden: int, inner: int, layers: int, step: int, dense: tuple[int, ...] = ()) -> Config:
    moe = MoeConfig(experts, 1, inner, 0, step, dense, 0.001)
    text = TextConfig(
        vocab_size=5,
        hidden_size=hidden,
        intermediate_size=7,
        num_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        mrope_section=(1, 0, 0),
        partial_rotary_factor=1.0,
        max_position_embeddings=8,
        initializer_range=0.02,
        moe=moe,
    )
    vision = VisionConfig(1, 4, 3, 1, 1, 1, 1, 1, hidden, 4, (0,), 0.02)
    names = ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe")
    return Config(*names, text, vision, 0, 1, 2, 3, tie_word_embeddings=False, dtype="float32")


@st.composite
def configs(draw) -> Config:
    """All layers with experts, some, or none; any sizes, also those that make a weight square."""
    layers = draw(st.integers(1, 4))
    dense = tuple(sorted(draw(st.sets(st.integers(0, layers - 1)))))
    sizes = [draw(st.integers(1, 6)) for _ in range(3)]
    return make(*sizes, layers, draw(st.integers(1, 3)), dense)


def distinct(shapes) -> dict[str, torch.Tensor]:
    """Tensors in which no number occurs twice."""
    start, result = 0, {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        result[name] = torch.arange(start, start + count).reshape(shape)
        start += count
    return result


def specs(shapes) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(shape), torch.bfloat16) for name, shape in shapes.items()}


def as_form(single: dict[str, torch.Tensor], config: Config, form: ExpertForm) -> dict[str, torch.Tensor]:
    """The same model with its experts in another form, made with torch alone from single experts `[out, in]`."""
    result = {name: tensor for name, tensor in single.items() if ".mlp.experts." not in name}
    if form is ExpertForm.PER_EXPERT:
        return single
    for layer in range(config.text.num_layers):
        place = f"{HF_LAYERS}.{layer}.mlp.experts"
        if f"{place}.0.gate_proj.weight" not in single:
            continue
        parts = {
            part: torch.stack([single[f"{place}.{i}.{part}_proj.weight"] for i in range(config.text.moe.num_experts)])
            for part in ("gate", "up", "down")
        }
        fused = {"gate_up": torch.cat([parts["gate"], parts["up"]], dim=1), "down": parts["down"]}
        turn = form is ExpertForm.FUSED_IN_OUT
        result |= {f"{place}.{k}_proj": v.transpose(1, 2).contiguous() if turn else v for k, v in fused.items()}
    return result


@SETTINGS
@given(configs(), FORMS)
def test_there_and_back_is_the_same(config, form):
    table = find(config).table(config, form)
    hf = distinct(table.hf_shapes)
    megatron = table.to_megatron(hf)
    back = table.to_hf(megatron)
    assert back.keys() == hf.keys()
    assert all(torch.equal(back[name], hf[name]) for name in hf)
    assert sum(t.numel() for t in hf.values()) == sum(t.numel() for t in megatron.values())
    Plan(table, specs(table.hf_shapes), specs(table.megatron_shapes))


@SETTINGS
@given(configs(), FORMS)
def test_the_three_forms_of_a_model_are_one_megatron_model(config, form):
    family = find(config)
    table = family.table(config, ExpertForm.PER_EXPERT)
    single = distinct(table.hf_shapes)
    other = as_form(single, config, form)
    expected, found = table.to_megatron(single), family.table(config, form).to_megatron(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@SETTINGS
@given(configs())
def test_each_expert_has_its_gate_then_its_up_rows_and_the_router_its_own(config):
    """Read out of Megatron's tensors as its SequentialMLP does, expert by expert."""
    table = find(config).table(config, ExpertForm.PER_EXPERT)
    hf = distinct(table.hf_shapes)
    megatron = table.to_megatron(hf)
    inner = config.text.moe.moe_intermediate_size
    for layer in filter(config.text.moe.is_moe_layer, range(config.text.num_layers)):
        stacked = f"{LAYERS}.{FC1}" in megatron
        fc1, fc2, router, norm = (
            megatron[f"{LAYERS}.{name}"][layer] if stacked else megatron[f"{LAYERS}.{layer}.{name}"]
            for name in (FC1, FC2, "mlp.router.weight", "pre_mlp_layernorm.weight")
        )
        place = f"{HF_LAYERS}.{layer}"
        for expert in range(config.text.moe.num_experts):
            gate, up, down = (hf[f"{place}.mlp.experts.{expert}.{p}_proj.weight"] for p in ("gate", "up", "down"))
            assert torch.equal(fc1[expert, :inner], gate)
            assert torch.equal(fc1[expert, inner:], up)
            assert torch.equal(fc2[expert], down)
        assert torch.equal(router, hf[f"{place}.mlp.gate.weight"])
        assert torch.equal(norm, hf[f"{place}.post_attention_layernorm.weight"])


@SETTINGS
@given(configs())
def test_layers_that_differ_are_named_one_by_one_and_layers_alike_are_stacked(config):
    """As Megatron does, which has no stack for layers of several kinds."""
    table = find(config).table(config)
    kinds = [config.text.moe.is_moe_layer(layer) for layer in range(config.text.num_layers)]
    for name, shape in table.megatron_shapes.items():
        if name.startswith(LAYERS):
            number = name.removeprefix(f"{LAYERS}.").partition(".")[0]
            assert number.isdecimal() == (len(set(kinds)) > 1), name
            assert number.isdecimal() or shape[0] == len(kinds), name
    experts = [layer for layer in range(len(kinds)) if f"{HF_LAYERS}.{layer}.mlp.gate.weight" in table.hf_shapes]
    dense = [layer for layer in range(len(kinds)) if f"{HF_LAYERS}.{layer}.mlp.up_proj.weight" in table.hf_shapes]
    assert experts == [layer for layer, kind in enumerate(kinds) if kind]
    assert dense == [layer for layer, kind in enumerate(kinds) if not kind]


@SETTINGS
@given(configs(), FORMS, st.data())
def test_any_region_of_either_side_is_the_slice_of_the_whole(config, form, data):
    table = find(config).table(config, form)
    hf = distinct(table.hf_shapes)
    megatron = table.to_megatron(hf)
    for whole, other, sources in ((megatron, hf, table.hf_sources), (hf, megatron, table.megatron_sources)):
        names = sorted(name for name in whole if ".mlp." in name and not name.startswith(("vision", "model.visual")))
        name = data.draw(st.sampled_from(names))
        offset = tuple(data.draw(st.integers(0, extent - 1)) for extent in whole[name].shape)
        shape = tuple(
            data.draw(st.integers(1, extent - start)) for extent, start in zip(whole[name].shape, offset, strict=True)
        )
        region = Region(name, offset, shape)
        assert torch.equal(assemble(sources(region), shape, other), whole[name][region.slices])


@pytest.mark.parametrize("form", list(ExpertForm))
@pytest.mark.parametrize("mixed", [False, True], ids=["alike", "mixed"])
@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 4)])
def test_every_rank_gets_its_experts_and_its_rows(ep, etp, mixed, form):
    """As Megatron cuts: experts over EP; fc1 by rows of the gate and of the up half, fc2 by columns, over ETP."""
    experts, hidden, inner, layers = 4, 6, 8, 2
    config = make(experts, hidden, inner, layers, 1, (0,) if mixed else ())
    table = find(config).table(config, form)
    hf = distinct(table.hf_shapes)
    whole = find(config).table(config, form).to_megatron(hf)
    share, part = experts // ep, inner // etp
    for layer in (1,) if mixed else range(layers):
        fc1, fc2 = (f"{LAYERS}.{layer}.{name}" if mixed else f"{LAYERS}.{name}" for name in (FC1, FC2))
        full1, full2 = (whole[name] if mixed else whole[name][layer] for name in (fc1, fc2))
        stack, one = ((), ()) if mixed else ((layer,), (1,))
        for rank in range(ep * etp):
            for expert in range((rank // etp) * share, (rank // etp + 1) * share):
                start = (rank % etp) * part
                for half in (0, inner):
                    region = Region(fc1, (*stack, expert, half + start, 0), (*one, 1, part, hidden))
                    found = assemble(table.hf_sources(region), region.shape, hf).view(part, hidden)
                    assert torch.equal(found, full1[expert, half + start : half + start + part])
                region = Region(fc2, (*stack, expert, 0, start), (*one, 1, hidden, part))
                found = assemble(table.hf_sources(region), region.shape, hf).view(hidden, part)
                assert torch.equal(found, full2[expert, :, start : start + part])


@pytest.mark.parametrize("form", list(ExpertForm))
def test_a_slice_of_one_expert_asks_for_that_slice_alone(form):
    config = make(experts=8, hidden=6, inner=4, layers=3, step=1)
    pieces = find(config).table(config, form).hf_sources(Region(f"{LAYERS}.{FC1}", (1, 5, 2, 0), (1, 1, 2, 6)))
    assert [piece.source.volume for piece in pieces] == [12]
    assert pieces[0].source.name.startswith(f"{HF_LAYERS}.1.mlp.experts.")
    assert pieces[0].transposed == (form is ExpertForm.FUSED_IN_OUT)


@SETTINGS
@given(configs(), FORMS)
def test_the_form_is_found_from_the_tensors(config, form):
    family, text = find(config), config.text
    found = specs(family.table(config, form).hf_shapes)
    square = text.hidden_size in (text.moe.moe_intermediate_size, 2 * text.moe.moe_intermediate_size)
    if not any(map(text.moe.is_moe_layer, range(text.num_layers))):
        assert family.find_expert_form(config, found) is ExpertForm.FUSED_IN_OUT
    elif square and form is not ExpertForm.PER_EXPERT:
        with pytest.raises(VLBridgeError, match='cannot be seen: say which it is with experts="fused_in_out"'):
            family.find_expert_form(config, found)
        assert family.find_expert_form(config, found, form.value) is form
    else:
        assert family.find_expert_form(config, found) is form


def test_without_tensors_the_form_is_that_of_the_hub():
    config = make(4, 6, 5, 2, 1)
    assert find(config).find_expert_form(config) is ExpertForm.FUSED_IN_OUT
    shapes = find(config).table(config).hf_shapes
    assert shapes[f"{HF_LAYERS}.0.mlp.experts.gate_up_proj"] == (4, 6, 10)
    assert shapes[f"{HF_LAYERS}.0.mlp.experts.down_proj"] == (4, 5, 6)


@pytest.mark.parametrize(("inner", "down"), [(6, (4, 6, 6)), (3, (4, 3, 6))], ids=["I=H", "2I=H"])
def test_a_square_weight_is_refused_although_the_other_is_not_square(inner, down):
    config = make(4, 6, inner, 2, 1)
    found = specs(find(config).table(config).hf_shapes)
    assert found[f"{HF_LAYERS}.0.mlp.experts.down_proj"].shape == down
    with pytest.raises(VLBridgeError, match=r"layers\.0\.mlp\.experts\.gate_up_proj.*The hidden size 6 makes one"):
        find(config).find_expert_form(config, found)


@pytest.mark.parametrize(
    "shapes",
    [((4, 6, 10), (4, 6, 5)), ((4, 10, 6), (4, 5, 6)), ((3, 6, 10), (3, 5, 6)), ((6, 10), (4, 5, 6))],
    ids=["down-turned", "gate-up-turned", "experts", "rank"],
)
def test_experts_of_neither_orientation_are_refused(shapes):
    config = make(4, 6, 5, 2, 1)
    names = [f"{HF_LAYERS}.0.mlp.experts.{part}_proj" for part in ("gate_up", "down")]
    with pytest.raises(VLBridgeError, match=r"gate_up_proj and .*expected \[4, 6, 10\] and \[4, 5, 6\]"):
        find(config).find_expert_form(config, specs(dict(zip(names, shapes, strict=True))))


def test_layers_of_two_orientations_are_refused():
    config = make(4, 6, 5, 2, 1)
    family = find(config)
    found = specs(family.table(config, ExpertForm.FUSED_IN_OUT).hf_shapes)
    turned = specs(family.table(config, ExpertForm.FUSED_OUT_IN).hf_shapes)
    found |= {name: spec for name, spec in turned.items() if f"{HF_LAYERS}.1." in name}
    table = family.table(config, family.find_expert_form(config, found))
    with pytest.raises(
        VLBridgeError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: expected \[4, 6, 10\], found \[4, 10, 6\]"
    ):
        Plan(table, found, specs(table.megatron_shapes))


def test_a_missing_expert_is_refused():
    config = make(4, 6, 5, 2, 1)
    family = find(config)
    found = specs(family.table(config, ExpertForm.PER_EXPERT).hf_shapes)
    del found[f"{HF_LAYERS}.0.mlp.experts.0.gate_proj.weight"]
    table = family.table(config, family.find_expert_form(config, found))
    with pytest.raises(VLBridgeError, match=r"in 1 places:[\s\S]*layers\.0\.mlp\.experts\.0\.gate_proj\.weight"):
        Plan(table, found, specs(table.megatron_shapes))


def test_an_option_that_makes_no_sense_is_refused():
    config = make(4, 6, 5, 2, 1)
    with pytest.raises(VLBridgeError, match="experts: expected one of hub, fused_in_out, fused_out_in, per_expert"):
        find(config).find_expert_form(config, asked="transposed")
    dense = read_config(CONFIGS / "Qwen3-VL-2B-Instruct.json")
    with pytest.raises(VLBridgeError, match="a model without experts"):
        find(dense).find_expert_form(dense, asked="per_expert")


def test_the_form_of_the_hub_is_that_of_the_family_whatever_a_checkpoint_has():
    """What vLLM and sglang load: transposed for Qwen3-VL-MoE, as the linears are for Qwen3.5-MoE."""
    forms = {
        "Qwen3-VL-30B-A3B-Instruct": ExpertForm.FUSED_IN_OUT,
        "Qwen3.5-35B-A3B": ExpertForm.FUSED_OUT_IN,
        "Qwen3-VL-2B-Instruct": ExpertForm.FUSED_IN_OUT,  # without experts it is not an error
    }
    for name, form in forms.items():
        config = read_config(CONFIGS / f"{name}.json")
        found = specs(find(config).table(config, ExpertForm.PER_EXPERT).hf_shapes)
        assert find(config).find_expert_form(config, found, "hub") is form


def test_transposed_regions_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="same rectangle"):
        Move(Region.whole("a", (2, 3, 4)), Region.whole("b", (2, 3, 4)), transposed=True)


@SETTINGS
@given(st.data())
def test_an_index_finds_what_looking_at_every_region_finds(data):
    """Regions of any grid, also with dims of one index before the dim along which they are cut."""
    cuts = [sorted(data.draw(st.sets(st.integers(1, 5), max_size=3)) | {0, 6}) for _ in range(3)]
    grid = [[(a, b - a) for a, b in pairwise(cut)] for cut in cuts]
    regions = [Region("t", (i, j, k), (a, b, c)) for i, a in grid[0] for j, b in grid[1] for k, c in grid[2]]
    index = RegionIndex((region, Region.whole(str(n), region.shape), False) for n, region in enumerate(regions))
    offset = tuple(data.draw(st.integers(0, 6)) for _ in range(3))
    wanted = Region("t", offset, tuple(data.draw(st.integers(0, 6)) for _ in range(3)))
    expected = {str(n) for n, region in enumerate(regions) if region.intersection(wanted)}
    assert {piece.source.name for piece in index.pieces(wanted)} == expected


def test_single_experts_share_the_rows_of_their_tensor():
    table = RuleTable([SingleExperts(("e.{}.a", "e.{}.b"), "m", (2, 4, 3))])
    assert table.hf_shapes == {f"e.{e}.{part}": (2, 3) for e in range(2) for part in "ab"}
    assert table.megatron_shapes == {"m": (2, 4, 3)}


@pytest.mark.parametrize("form", list(ExpertForm))
def test_the_235b_checkpoint_is_planned_from_headers_with_few_calls_per_tensor(form):
    config = read_config(CONFIGS / "Qwen3-VL-235B-A22B-Instruct.json")
    family = find(config)
    hf = specs(family.table(config, form).hf_shapes)
    with count_calls() as calls:
        table = family.table(config, family.find_expert_form(config, hf))
        plan = Plan(table, hf, specs(table.megatron_shapes))
    assert sum(spec.nbytes for spec in plan.hf.values()) == 2 * 235_670_022_896
    # As many for a tensor of a thousand as for one of 37,000; about a microsecond each.
    assert calls[0] < 200 * len(hf)


def test_the_30b_checkpoint_has_the_parameters_that_are_published():
    config = read_config(CONFIGS / "Qwen3-VL-30B-A3B-Instruct.json")
    shapes = find(config).table(config).hf_shapes
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 31_070_754_032
    assert shapes[f"{HF_LAYERS}.0.mlp.experts.gate_up_proj"] == (128, 2048, 1536)
    assert shapes[f"{HF_LAYERS}.47.mlp.experts.down_proj"] == (128, 768, 2048)


def test_a_model_whose_layers_are_all_dense_has_no_experts():
    config = make(4, 6, 5, 2, 1, dense=(0, 1))
    dense = dataclasses.replace(
        config, architecture="Qwen3VLForConditionalGeneration", text=dataclasses.replace(config.text, moe=None)
    )
    assert find(config).table(config).megatron_shapes == find(dense).table(dense).megatron_shapes
