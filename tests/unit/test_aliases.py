"""Names of wrapped models: a wrapper counts only where every tensor has it."""

import pytest

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families.aliases import hub_names, strip_wrappers

WRAPPED = ["module.model.visual.pos_embed.weight", "module.lm_head.weight"]


def test_a_wrapper_that_every_name_has_is_stripped_however_often() -> None:
    assert strip_wrappers(WRAPPED) == "module."
    assert strip_wrappers([f"module.{name}" for name in WRAPPED]) == "module.module."
    names, notes = hub_names(WRAPPED, "folder")
    assert list(names.values()) == ["model.visual.pos_embed.weight", "lm_head.weight"]
    assert len(notes) == 2


def test_a_wrapper_that_some_names_have_is_part_of_their_names() -> None:
    """So that two checkpoints in one folder are not taken for one."""
    mixed = [WRAPPED[0], "lm_head.weight"]
    assert strip_wrappers(mixed) == ""
    assert hub_names(mixed, "folder")[0] == {name: name for name in mixed}


def test_no_names_have_no_wrapper() -> None:
    assert strip_wrappers([]) == ""


def test_modules_of_an_attention_may_have_the_names_of_diffusers() -> None:
    names = ["layers.0.self_attn.to_q.weight", "layers.0.self_attn.norm_k.weight", "blocks.0.attn.qkv.weight"]
    found, notes = hub_names(names, "folder")
    assert list(found.values()) == [
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.k_norm.weight",
        "model.visual.blocks.0.attn.qkv.weight",
    ]
    assert notes == [
        "names without a prefix are read as model.language_model.*",
        "names without a prefix are read as model.visual.*",
        "names *.self_attn.norm_k.* are read as *.self_attn.k_norm.*",
        "names *.self_attn.to_q.* are read as *.self_attn.q_proj.*",
    ]


@pytest.mark.parametrize("other", ["adapter.self_attn.to_q.weight", "merger.extra", "norm_moe_gen.weight"])
def test_what_is_of_no_part_keeps_its_name(other: str) -> None:
    names = ["model.visual.merger.norm.weight", "model.language_model.norm.weight", other]
    assert hub_names(names, "folder") == ({name: name for name in names}, [])


def test_two_names_of_one_tensor_are_rejected() -> None:
    names = [f"layers.0.self_attn.{module}.weight" for module in ("to_q", "q_proj")]
    with pytest.raises(VLBridgeError, match=r"expected one tensor for .*q_proj.weight, found .*to_q.*q_proj"):
        hub_names(names, "folder")
