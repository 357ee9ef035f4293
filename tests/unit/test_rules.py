"""The rules: invertible bit for bit, right in their layout, and every slice equal to the slice of the whole."""

import re
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlbridge.config import Config, TextConfig, VisionConfig
from megatron_vlbridge.families import find
from megatron_vlbridge.weights import Region, RuleTable, SplitRows, grouped_qkv, vision_qkv
from megatron_vlbridge.weights.rules import assemble

SETTINGS = settings(max_examples=25, deadline=None)


@st.composite
def configs(draw) -> Config:
    kv, per_group, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3))
    vision_heads = draw(st.sampled_from([1, 2, 8]))
    depth = draw(st.integers(1, 3))
    hidden, merge = draw(st.integers(1, 9)), draw(st.integers(1, 2))
    text = TextConfig(
        vocab_size=draw(st.integers(4, 9)),
        hidden_size=hidden,
        intermediate_size=draw(st.integers(1, 9)),
        num_layers=draw(st.integers(1, 4)),
        num_attention_heads=kv * per_group,
        num_key_value_heads=kv,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        mrope_section=(head_dim // 2, 0, 0),
        partial_rotary_factor=1.0,
        max_position_embeddings=8,
        initializer_range=0.02,
    )
    vision = VisionConfig(
        depth=depth,
        hidden_size=4 * vision_heads,
        intermediate_size=draw(st.integers(1, 9)),
        num_heads=vision_heads,
        in_channels=draw(st.integers(1, 3)),
        patch_size=2,
        temporal_patch_size=2,
        spatial_merge_size=merge,
        out_hidden_size=hidden,
        num_position_embeddings=4,
        deepstack_visual_indexes=tuple(range(draw(st.integers(0, depth)))),
        initializer_range=0.02,
    )
    names = ("Qwen3VLForConditionalGeneration", "qwen3_vl")
    return Config(*names, text, vision, 0, 1, 2, 3, tie_word_embeddings=draw(st.booleans()), dtype="float32")


def distinct(shapes, dtype=torch.int64) -> dict[str, torch.Tensor]:
    """Tensors in which no number occurs twice, so that equality means that nothing was mixed up."""
    start, result = 0, {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        result[name] = torch.arange(start, start + count, dtype=dtype).reshape(shape)
        start += count
    return result


@SETTINGS
@given(configs())
def test_there_and_back_is_the_same(config):
    table = find(config).table(config)
    hf = distinct(table.hf_shapes)
    megatron = table.to_megatron(hf)
    assert {name: tuple(tensor.shape) for name, tensor in megatron.items()} == table.megatron_shapes
    back = table.to_hf(megatron)
    assert back.keys() == hf.keys()
    assert all(torch.equal(back[name], hf[name]) for name in hf)
    assert sum(t.numel() for t in hf.values()) == sum(t.numel() for t in megatron.values())


@SETTINGS
@given(configs(), st.data())
def test_any_region_of_either_side_is_the_slice_of_the_whole(config, data):
    table = find(config).table(config)
    hf = distinct(table.hf_shapes)
    megatron = table.to_megatron(hf)
    for whole, other, sources in ((megatron, hf, table.hf_sources), (hf, megatron, table.megatron_sources)):
        name = data.draw(st.sampled_from(sorted(whole)))
        offset = tuple(data.draw(st.integers(0, extent - 1)) for extent in whole[name].shape)
        shape = tuple(
            data.draw(st.integers(1, extent - start)) for extent, start in zip(whole[name].shape, offset, strict=True)
        )
        region = Region(name, offset, shape)
        assert torch.equal(assemble(sources(region), shape, other), whole[name][region.slices])


@SETTINGS
@given(configs(), st.sampled_from([1, 2, 3, 4, 6, 8]))
def test_every_tensor_parallel_slice_is_the_slice_of_the_whole(config, tp):
    """Also where `tp` exceeds the KV groups: a slice of rows then cuts through a group or a head."""
    table = find(config).table(config)
    hf = distinct(table.hf_shapes)
    megatron = table.to_megatron(hf)
    for name, tensor in megatron.items():
        dim = 1 if ".layers." in name and tensor.ndim > 1 else 0
        if tensor.shape[dim] % tp:
            continue
        for rank, part in enumerate(tensor.chunk(tp, dim)):
            offset = tuple(rank * part.shape[axis] if axis == dim else 0 for axis in range(tensor.ndim))
            region = Region(name, offset, tuple(part.shape))
            assert torch.equal(assemble(table.hf_sources(region), tuple(part.shape), hf), part)


@SETTINGS
@given(configs())
def test_a_layer_asked_for_by_its_number_is_that_layer_of_the_stack(config):
    table = find(config).table(config)
    hf = distinct(table.hf_shapes)
    megatron = table.to_megatron(hf)
    stacked = "language_model.decoder.layers.self_attention.linear_qkv.weight"
    for layer in range(config.text.num_layers):
        name = stacked.replace("layers.", f"layers.{layer}.")
        shape = tuple(megatron[stacked].shape[1:])
        pieces = table.hf_sources(Region.whole(name, shape))
        assert torch.equal(assemble(pieces, shape, hf), megatron[stacked][layer])


@SETTINGS
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_grouped_qkv_gives_each_head_its_own_rows(groups, per_group, head_dim, hidden, gated):
    """Reads q, the gates, k and v of each head out of the fused weight, head by head, as grouped attention does."""
    heads = groups * per_group
    table = RuleTable([grouped_qkv("q", "k", "v", "qkv", heads, groups, head_dim, (hidden,), gated=gated)])
    hf = distinct(table.hf_shapes)
    fused = table.to_megatron(hf)["qkv"]
    # `[heads, 1 or 2, head_dim, hidden]`, as transformers views it: each head's query, then its gate.
    queries = hf["q"].view(heads, 1 + gated, head_dim, hidden)
    row = 0
    for group in range(groups):
        for part in range(1 + gated):
            for head in range(group * per_group, (group + 1) * per_group):
                assert torch.equal(fused[row : row + head_dim], queries[head, part])
                row += head_dim
        for part in ("k", "v"):
            assert torch.equal(fused[row : row + head_dim], hf[part][group * head_dim : (group + 1) * head_dim])
            row += head_dim
    assert row == fused.shape[0]


@SETTINGS
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.lists(st.integers(1, 3), max_size=2))
def test_split_rows_gives_each_part_its_own_rows(rows, columns):
    names = [f"part{index}" for index in range(len(rows))]
    table = RuleTable([SplitRows("whole", tuple(zip(names, rows, strict=True)), tuple(columns))])
    hf = distinct(table.hf_shapes)
    assert hf["whole"].shape == (sum(rows), *columns)
    parts = table.to_megatron(hf)
    for name, expected in zip(names, hf["whole"].split(rows), strict=True):
        assert torch.equal(parts[name], expected)


# Of one layer or merger: Hugging Face's name -> Megatron's, for every tensor that is copied whole.
DECODER = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
BLOCK = {
    "norm1.weight": "self_attention.linear_qkv.layer_norm_weight",
    "norm1.bias": "self_attention.linear_qkv.layer_norm_bias",
    "attn.proj.weight": "self_attention.linear_proj.weight",
    "attn.proj.bias": "self_attention.linear_proj.bias",
    "norm2.weight": "mlp.linear_fc1.layer_norm_weight",
    "norm2.bias": "mlp.linear_fc1.layer_norm_bias",
    "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
    "mlp.linear_fc1.bias": "mlp.linear_fc1.bias",
    "mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
    "mlp.linear_fc2.bias": "mlp.linear_fc2.bias",
}
ENDS = {
    "model.language_model.embed_tokens.weight": "language_model.embedding.word_embeddings.weight",
    "model.language_model.norm.weight": "language_model.decoder.final_layernorm.weight",
    "lm_head.weight": "language_model.output_layer.weight",
    "mtp.pre_fc_norm_embedding.weight": "language_model.mtp.layers.0.enorm.weight",
    "mtp.pre_fc_norm_hidden.weight": "language_model.mtp.layers.0.hnorm.weight",
    "mtp.fc.weight": "language_model.mtp.layers.0.eh_proj.weight",
    "mtp.norm.weight": "language_model.mtp.layers.0.final_layernorm.weight",
}
STACKS = {
    "model.language_model.layers.": (DECODER, "language_model.decoder.layers."),
    "model.visual.blocks.": (BLOCK, "vision_model.decoder.layers."),
}
FUSED = re.compile(r"(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj|attn\.qkv)\.(weight|bias)$")


@SETTINGS
@given(configs(), st.integers(0, 1))
def test_every_tensor_that_is_copied_is_where_megatron_has_it(config, mtp):
    config = replace(config, text=replace(config.text, num_mtp_layers=mtp))
    table = find(config).table(config)
    hf = distinct(table.hf_shapes)
    megatron = table.to_megatron(hf)
    for name, tensor in hf.items():
        if not FUSED.search(name):
            assert torch.equal(place(megatron, name), tensor), name


def place(megatron, name):
    """The Megatron tensor that Hugging Face calls `name`."""
    for prefix, (names, stack) in STACKS.items():
        if name.startswith(prefix):
            layer, _, rest = name.removeprefix(prefix).partition(".")
            return megatron[stack + names[rest]][int(layer)]
    if name.startswith("mtp.layers.0."):
        return megatron["language_model.mtp.layers.0.transformer_layer." + DECODER[name.removeprefix("mtp.layers.0.")]]
    return megatron[ENDS[name] if name in ENDS else name.replace("model.visual.", "vision_model.")]


@SETTINGS
@given(configs(), st.integers(0, 1))
def test_every_layer_has_its_gate_then_its_up_rows(config, mtp):
    """Megatron's MLP chunks the output of fc1 in two and multiplies silu(first) by second."""
    config = replace(config, text=replace(config.text, num_mtp_layers=mtp))
    table = find(config).table(config)
    hf = distinct(table.hf_shapes)
    megatron = table.to_megatron(hf)
    stack = megatron["language_model.decoder.layers.mlp.linear_fc1.weight"]
    fused = {f"model.language_model.layers.{layer}": stack[layer] for layer in range(config.text.num_layers)}
    if mtp:
        fused["mtp.layers.0"] = megatron["language_model.mtp.layers.0.transformer_layer.mlp.linear_fc1.weight"]
    for layer, weight in fused.items():
        gate, up = weight.chunk(2)
        assert torch.equal(gate, hf[f"{layer}.mlp.gate_proj.weight"])
        assert torch.equal(up, hf[f"{layer}.mlp.up_proj.weight"])


def test_vision_qkv_is_right_at_every_tensor_parallel_size():
    """Each rank's rows, read as (head, q/k/v, head_dim), are the q, k and v that HF computes for the rank's heads."""
    heads, head_dim, hidden = 8, 4, 32
    table = RuleTable(
        [
            vision_qkv("qkv.weight", "fused.weight", heads, head_dim, (hidden,), layer=0),
            vision_qkv("qkv.bias", "fused.bias", heads, head_dim, (), layer=0),
        ]
    )
    generator = torch.Generator().manual_seed(0)
    hf = {
        name: torch.randint(-9, 9, shape, generator=generator, dtype=torch.int64)
        for name, shape in table.hf_shapes.items()
    }
    x = torch.randint(-9, 9, (5, hidden), generator=generator, dtype=torch.int64)
    expected = (x @ hf["qkv.weight"].T + hf["qkv.bias"]).reshape(5, 3, heads, head_dim)
    for tp in (1, 2, 4, 8):
        rows = 3 * hidden // tp
        for rank in range(tp):
            weight = Region("fused.weight", (0, rank * rows, 0), (1, rows, hidden))
            bias = Region("fused.bias", (0, rank * rows), (1, rows))
            local_weight = assemble(table.hf_sources(weight), weight.shape, hf)[0]
            local_bias = assemble(table.hf_sources(bias), bias.shape, hf)[0]
            local = (x @ local_weight.T + local_bias).reshape(5, heads // tp, 3, head_dim)
            for part in range(3):
                mine = slice(rank * heads // tp, (rank + 1) * heads // tp)
                assert torch.equal(local[:, :, part], expected[:, part, mine])


@SETTINGS
@given(configs(), st.data())
def test_pieces_equal_brute_force_over_every_move(config, data):
    table = find(config).table(config)
    name = data.draw(st.sampled_from(sorted(table.megatron_shapes)))
    shape = table.megatron_shapes[name]
    offset = tuple(data.draw(st.integers(0, extent)) for extent in shape)
    region = Region(name, offset, tuple(data.draw(st.integers(0, extent + 2)) for extent in shape))
    covered = {}
    for move in table.moves:
        common = move.megatron.intersection(region) if move.megatron.name == name else None
        if common:
            covered[common] = move.hf.name
    found = {
        Region(name, tuple(a + b for a, b in zip(p.target.offset, offset, strict=True)), p.target.shape): p.source.name
        for p in table.hf_sources(region)
    }
    assert found == covered


def test_an_unknown_name_has_no_pieces():
    table = RuleTable([vision_qkv("qkv", "fused", 1, 1, ())])
    assert table.hf_sources(Region("other", (0,), (1,))) == []
