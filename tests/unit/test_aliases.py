"""Names of wrapped models: a wrapper counts only where every tensor has it."""

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
