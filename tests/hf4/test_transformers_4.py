"""Transformers 4.57, the first that knew these models: what it saves is imported, and what is exported it loads."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.export_plan import ExportChoices, plan_export
from megatron_vlbridge.families import ExpertForm
from tests.closeness import assert_close_in_norm, relative_error
from tests.hf4.logits import load, logits
from tests.hf4.save import save
from tests.unit.test_convert import assert_same_bits, tensors

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
KINDS = ("dense", "experts")


def new_one(module: str, *arguments: object) -> None:
    """Run a module with transformers 5."""
    command = [ROOT / ".venv/bin/python", "-m", module, *arguments]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT)


def logits_of_the_new_one(folder: Path) -> torch.Tensor:
    file = folder.parent / f"{folder.name}.logits"
    new_one("tests.hf4.logits", folder, file)
    return torch.load(file)


def test_it_is_the_old_one() -> None:
    assert transformers.__version__.startswith("4.57.")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_saved_comes_back_and_loads(tmp_path: Path, kind: str, tied: bool) -> None:
    source = save(tmp_path / "hf", kind, tied)
    back = export_checkpoint(import_checkpoint(source, tmp_path / "megatron"), tmp_path / "back")
    expected, found = tensors(source), tensors(back)
    assert_same_bits(found, expected)
    for name, parameter in load(back).state_dict().items():
        if name in expected:
            assert torch.equal(parameter, expected[name].float()), name
    assert (read_config(back).tie_word_embeddings, "lm_head.weight" in found) == (tied, not tied)


@pytest.mark.parametrize("kind", KINDS)
def test_the_new_one_computes_the_same_from_an_export(tmp_path: Path, kind: str) -> None:
    """By which the Megatron model is measured in all other tests."""
    imported = import_checkpoint(save(tmp_path / "hf", kind, tied=False), tmp_path / "megatron")
    back = export_checkpoint(imported, tmp_path / "back")
    assert_close_in_norm(logits(back), logits_of_the_new_one(back))


@pytest.mark.parametrize("form", [form for form in ExpertForm if form is not ExpertForm.FUSED_IN_OUT])
def test_experts_of_any_form_are_exported_as_it_wants_them(tmp_path: Path, form: ExpertForm) -> None:
    source = save(tmp_path / "hf", "experts", tied=False)
    imported = import_checkpoint(source, tmp_path / "megatron")
    other = export_checkpoint(imported, tmp_path / "other", experts=str(form))
    again = import_checkpoint(other, tmp_path / "again")
    back = export_checkpoint(again, tmp_path / "back", experts=str(ExpertForm.FUSED_IN_OUT))
    assert torch.equal(logits(back), logits(source))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_read_a_portable_config_of_what_the_new_one_saved(tmp_path: Path, kind: str, tied: bool) -> None:
    source = tmp_path / "hf"
    new_one("tests.hf4.save", source, kind, *(["tied"] if tied else []))
    imported = import_checkpoint(source, tmp_path / "megatron")
    options: dict[str, Any] = {"experts": str(ExpertForm.FUSED_IN_OUT)} if kind == "experts" else {}
    plain = export_checkpoint(imported, tmp_path / "plain", **options)
    with pytest.raises((RuntimeError, AttributeError, AssertionError)):
        logits(plain)
    plan = plan_export(imported, tmp_path / "x", choices=ExportChoices(**options))
    (note,) = (note for note in plan.notes if "4.57" in note)
    assert "rope_theta 5000000.0 instead of 10000.0" in note
    back = export_checkpoint(imported, tmp_path / "back", portable_config=True, **options)
    expected = logits_of_the_new_one(source)
    assert_close_in_norm(logits_of_the_new_one(back), expected)
    assert_close_in_norm(logits(back), expected)


def tie_above_only(config: dict[str, Any]) -> None:
    del config["text_config"]["tie_word_embeddings"]


def without_a_base(config: dict[str, Any]) -> None:
    """Then 5e6 is meant by the old one, 5e5 by the new one, which is what this project takes it for."""
    del config["text_config"]["rope_theta"]


@pytest.mark.parametrize("change", [tie_above_only, without_a_base])
def test_levels_and_defaults_that_disagree_are_said_and_made_to_agree(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    source = save(tmp_path / "hf", "dense", tied=True)
    edit_config(source, change)
    imported = import_checkpoint(source, tmp_path / "megatron")
    plain = export_checkpoint(imported, tmp_path / "plain")
    expected = logits_of_the_new_one(source)
    assert (plain / "config.json").read_bytes() == (source / "config.json").read_bytes()
    if change is without_a_base:  # loads, and is wrong
        assert relative_error(logits(plain), expected) > 100 * TOLERANCE
    assert any("4.57" in note for note in plan_export(imported, tmp_path / "x").notes)
    back = export_checkpoint(imported, tmp_path / "back", portable_config=True)
    assert_close_in_norm(logits(back), expected)
    assert_close_in_norm(logits_of_the_new_one(back), expected)


def test_a_config_that_both_read_alike_is_left_as_it_is(tmp_path: Path) -> None:
    source = save(tmp_path / "hf", "experts", tied=False)
    imported = import_checkpoint(source, tmp_path / "megatron")
    assert not any("4.57" in note for note in plan_export(imported, tmp_path / "x").notes)
    back = export_checkpoint(imported, tmp_path / "back", portable_config=True)
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
