"""A config.json for transformers 4.57 and 5.x: what it changes, and that nothing changes unasked.

That both compute the same from it is shown with both of them in `tests/hf4`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.export_plan import ExportChoices, plan_export
from megatron_vlbridge.checkpoint.hf.portable_config import differences_in_4, make_portable
from tests import reference
from tests.unit import test_convert_moe

Raw = dict[str, Any]


@pytest.fixture(scope="module", params=["dense", "experts"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, as transformers 5 saves it, and `megatron` made from it."""
    folder = tmp_path_factory.mktemp("model")
    if request.param == "dense":
        hf = reference.write_checkpoint(folder / "hf", layers=2, tied=True)
    else:
        hf = test_convert_moe.make(folder / "hf")
    import_checkpoint(hf, folder / "megatron")
    return folder


def notes_of(folder: Path, target: Path, **options: Any) -> list[str]:
    return [note for note in plan_export(folder, target, choices=ExportChoices(**options)).notes if "4.57" in note]


def test_a_portable_config_means_the_same(model: Path, tmp_path: Path) -> None:
    back = export_checkpoint(model / "megatron", tmp_path / "back", portable_config=True)
    assert read_config(back) == read_config(model / "hf")
    before, after = (AutoConfig.from_pretrained(folder) for folder in (model / "hf", back))
    assert after.text_config.to_dict() | {"tie_word_embeddings": None} == before.text_config.to_dict() | {
        "tie_word_embeddings": None
    }
    assert after.tie_word_embeddings == before.tie_word_embeddings
    assert after.vision_config == before.vision_config
    assert notes_of(model / "megatron", tmp_path / "x", portable_config=True)


def test_without_the_option_the_config_is_unchanged_and_the_difference_is_said(model: Path, tmp_path: Path) -> None:
    back = export_checkpoint(model / "megatron", tmp_path / "back")
    assert (back / "config.json").read_bytes() == (model / "hf" / "config.json").read_bytes()
    (note,) = notes_of(model / "megatron", tmp_path / "x")
    assert "--portable-config" in note
    assert "rope_scaling" in note
    assert ("num_experts 60 instead of 4" in note) == ("Moe" in read_config(back).architecture)


def portable(model: Path) -> Raw:
    return make_portable(json.loads((model / "hf" / "config.json").read_text()), read_config(model / "hf"))


def as_published(config: Raw) -> None:
    """The spellings of the Hub."""
    config["text_config"].pop("rope_parameters")
    config["text_config"].pop("num_local_experts", None)


def other_tie(config: Raw) -> None:
    config["text_config"]["tie_word_embeddings"] = not config["tie_word_embeddings"]


def other_section(config: Raw) -> None:
    config["text_config"]["rope_scaling"].pop("mrope_section")


def other_theta(config: Raw) -> None:
    config["text_config"]["rope_parameters"]["rope_theta"] = 1e4
    config["text_config"].pop("rope_theta")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (as_published, []),
        (other_tie, ["text_config.tie_word_embeddings"]),
        (other_section, ["text_config.rope_scaling.mrope_section [24, 20, 20]"]),
        (other_theta, ["text_config.rope_theta 5000000.0 instead of 10000.0"]),
    ],
)
def test_each_difference_is_found_and_mended(
    change: Callable[[Raw], None], found: list[str], model: Path, tmp_path: Path
) -> None:
    raw = portable(model)
    change(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_config(tmp_path)
    lines = list(differences_in_4(raw, config))
    assert len(lines) == len(found)
    assert all(line.startswith(start) for line, start in zip(lines, found, strict=True))
    assert list(differences_in_4(make_portable(raw, config), config)) == []


def test_a_portable_config_is_left_byte_by_byte(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model / "hf", tmp_path / "hf"))
    (source / "config.json").write_text(json.dumps(portable(model), indent="\t"))
    imported = import_checkpoint(source, tmp_path / "megatron")
    assert notes_of(imported, tmp_path / "x") == []
    back = export_checkpoint(imported, tmp_path / "back", portable_config=True)
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_portable_config_names_the_written_dtype(model: Path, tmp_path: Path) -> None:
    other = "float32" if read_config(model / "hf").dtype == "bfloat16" else "bfloat16"
    back = export_checkpoint(model / "megatron", tmp_path / "back", portable_config=True, dtype=other)
    assert read_config(back).dtype == other
    assert list(differences_in_4(json.loads((back / "config.json").read_text()), read_config(back))) == []
