"""What travels together out of a live model, and that nothing of it is missed."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.comparison import config_differences
from megatron_vlbridge.checkpoint.live import load_hf_weights
from megatron_vlbridge.checkpoint.live.export import fill_buckets, fused_groups
from megatron_vlbridge.checkpoint.live.shards import check_complete
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import ExpertForm, find
from megatron_vlbridge.weights import Copy, Region, RuleTable, TensorSpec
from tests import reference
from tests.unit.test_durability import OneRank


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return read_config(reference.write_checkpoint(tmp_path_factory.mktemp("experts"), experts={"mlp_only_layers": [1]}))


def test_a_folder_of_another_model_is_refused_by_the_fields_that_differ(tmp_path: Path) -> None:
    model = OneRank(reference.write_checkpoint(tmp_path / "hf", layers=2))
    other = reference.write_checkpoint(tmp_path / "other", layers=4, tied=True)
    before = {name: tensor.clone() for name, tensor in model.weights.items()}
    with pytest.raises(VLBridgeError, match=f"^{other}: 2 differences:") as caught:
        load_hf_weights(model, other)
    assert str(caught.value).splitlines()[1:3] == [
        "  text.num_layers: expected 2, as the model was built, found 4",
        "  tie_word_embeddings: expected False, as the model was built, found True",
    ]
    assert all(torch.equal(model.weights[name], tensor) for name, tensor in before.items())


def test_nested_fields_that_differ_are_all_found(config: Config) -> None:
    other = replace(
        config,
        text=replace(config.text, rope_theta=1.0, moe=replace(config.text.moe, num_experts=8)),
        vision=replace(config.vision, depth=9),
        dtype="float16",  # how weights are stored is not compared
    )
    assert list(config_differences(config, config)) == []
    assert list(config_differences(config, other)) == [
        ("text.rope_theta", 5000000.0, 1.0),
        ("text.moe.num_experts", 4, 8),
        ("vision.depth", 4, 9),
    ]
    dense = replace(config, text=replace(config.text, moe=None))
    assert list(config_differences(config, dense)) == [("text.moe", config.text.moe, None)]


@pytest.mark.parametrize("form", ExpertForm)
def test_every_tensor_is_in_one_group(config: Config, form: ExpertForm) -> None:
    table = find(config).table(config, form)
    assert list(itertools.chain(*fused_groups(table))) == list(table.hf_shapes)


def test_what_belongs_together_is_one_group(config: Config) -> None:
    groups = {
        name: group for group in fused_groups(find(config).table(config, ExpertForm.PER_EXPERT)) for name in group
    }
    layers = "model.language_model.layers"
    together = [
        [f"{layers}.0.self_attn.{part}_proj.weight" for part in "qkv"],
        [f"{layers}.1.mlp.{part}_proj.weight" for part in ("gate", "up")],
        [f"{layers}.2.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up")],
        [f"{layers}.2.mlp.experts.3.down_proj.weight"],
        ["model.visual.blocks.0.attn.qkv.weight"],
    ]
    assert [groups[names[0]] for names in together] == together


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), max_size=12), st.integers(1, 20))
def test_buckets_are_full_but_not_too_full(sizes: list[list[int]], limit: int) -> None:
    groups = [[f"{number}.{part}" for part in range(len(parts))] for number, parts in enumerate(sizes)]
    specs = {
        f"{number}.{part}": TensorSpec((size,), torch.uint8)
        for number, parts in enumerate(sizes)
        for part, size in enumerate(parts)
    }
    buckets = fill_buckets(groups, specs, limit)
    assert list(itertools.chain(*buckets)) == list(itertools.chain(*groups))
    held = [[group for group in groups if group[0] in bucket] for bucket in buckets]
    filled = [sum(specs[name].nbytes for name in bucket) for bucket in buckets]
    assert all(list(itertools.chain(*mine)) == bucket for mine, bucket in zip(held, buckets, strict=True))
    assert all(nbytes <= limit or len(mine) == 1 for mine, nbytes in zip(held, filled, strict=True))
    for nbytes, (first, *_) in zip(filled, held[1:], strict=False):
        assert nbytes + sum(specs[name].nbytes for name in first) > limit


SHAPE = (3, 4, 2)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    ends = [sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True))) for size in SHAPE]
    return Region("m", tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


@given(st.lists(regions(), max_size=12))
def test_a_hole_is_found_wherever_it_is(held: list[Region]) -> None:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    for region in held:
        mask[region.slices] = True
    table = RuleTable([Copy("hf", "m", SHAPE)])
    if mask.all():
        check_complete(table, held, "here")
        return
    with pytest.raises(VLBridgeError, match=r"here: expected every weight to be on some rank(.|\n)*\(hf\)") as raised:
        check_complete(table, held, "here")
    for line in str(raised.value).splitlines()[1:-1]:
        if "m[" in line:
            ends = line[line.index("[") + 1 : line.index("]")].split(", ")
            hole = tuple(slice(*map(int, end.split(":"))) for end in ends)
            assert not mask[hole].any()
            mask[hole] = True
    assert mask.all() or "more" in str(raised.value)
