"""More damaged and hostile checkpoints, of the forms that are published: scales, spellings, files, further tensors."""

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlbridge.checkpoint.convert import import_checkpoint
from megatron_vlbridge.checkpoint.hf.reader import INDEX
from tests import fp8_checkpoint, reference
from tests.unit import test_hostile
from tests.unit.test_hostile import (
    Culprits,
    Sound,
    a_tensor,
    check,
    check_readers,
    edit_header,
    edit_json,
    make_damaged,
    shards,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Sound]:
    """A folder as it is on the Hub, and one in which some weights have scales."""
    folder = tmp_path_factory.mktemp("sound")
    reference.write_checkpoint(folder / "hf", layers=2)
    fp8_checkpoint.quantise_folder(reference.write_checkpoint(folder / "fp8", layers=2))
    found = {}
    for kind in ("hf", "fp8"):
        import_checkpoint(folder / kind, folder / f"{kind}-megatron")
        found[kind] = Sound(folder / kind, folder / kind, folder / f"{kind}-megatron")
    return found


def two_spellings(folder: Path, chance: random.Random) -> Culprits:
    """One tensor under the name that another tool gives it: two names then begin in two ways."""
    path, name = a_tensor(folder, chance)
    others = {
        "model.language_model.": ["model.", "language_model.", ""],
        "model.visual.": ["visual."],
        "lm_head.": ["model.lm_head."],
    }
    part = next(part for part in others if name.startswith(part))
    other = chance.choice(others[part]) + name.removeprefix(part)
    edit_header(path, lambda header: header.update({other: header.pop(name)}))
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({other: index["weight_map"].pop(name)}))
    return other, part


def one_file_beside_an_index(folder: Path, chance: random.Random) -> Culprits:
    """Another checkpoint, or some of the same one."""
    tensors = load_file(chance.choice(shards(folder)))
    if chance.random() < 0.5:
        tensors = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return "model.safetensors:"


def further_tensor(folder: Path, chance: random.Random) -> Culprits:
    path = chance.choice(shards(folder))
    name = chance.choice(
        ["foo.bar", "model.language_model.layers.2.mlp.up_proj.weight", "model.visual.x", "mtp.norm.weight"]
    )
    save_file({**load_file(path), name: torch.zeros(3)}, path)
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: path.name}))
    return name


# --- weights in 8 bits with scales ---


def edit_scales(folder: Path, chance: random.Random, change: Callable[[torch.Tensor], torch.Tensor | None]) -> str:
    """Change the scales of one weight, in a file that is sound in itself, or take them away."""
    path = chance.choice([path for path in shards(folder) if any("_scale_inv" in name for name in load_file(path))])
    tensors = load_file(path)
    name = chance.choice(sorted(name for name in tensors if name.endswith("_scale_inv")))
    changed = change(tensors.pop(name))
    if changed is None:
        edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))
    else:
        tensors[name] = changed.contiguous()
    save_file(tensors, path)
    return name.removesuffix("_scale_inv")


def wrong_scale(folder: Path, chance: random.Random) -> Culprits:
    value = chance.choice([float("nan"), float("inf"), float("-inf"), 0.0, -0.5])
    return edit_scales(folder, chance, lambda scales: torch.full_like(scales, value))


def scales_of_another_shape(folder: Path, chance: random.Random) -> Culprits:
    return edit_scales(
        folder, chance, lambda s: chance.choice([s[:0], s[0], s.repeat(2, 1), s.repeat(1, 128), s[None], s.sum()])
    )


def scales_of_another_dtype(folder: Path, chance: random.Random) -> Culprits:
    dtype = chance.choice([torch.float16, torch.float64, torch.int32, torch.uint8])
    return edit_scales(folder, chance, lambda scales: scales.to(dtype))


def lost_scales(folder: Path, chance: random.Random) -> Culprits:
    return edit_scales(folder, chance, lambda scales: None)


def scales_of_another_weight(folder: Path, chance: random.Random) -> Culprits:
    """An unquantised weight gets scales, or a quantised one is not any more."""
    path = chance.choice([path for path in shards(folder) if any("layers" in name for name in load_file(path))])
    tensors = load_file(path)
    name = chance.choice(sorted(name for name in tensors if name.endswith("weight")))
    if f"{name}_scale_inv" in tensors:
        tensors[name] = tensors[name].to(chance.choice([torch.float32, torch.int8, torch.float8_e5m2]))
    else:
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
        edit_json(folder / INDEX, lambda index: index["weight_map"].update({f"{name}_scale_inv": path.name}))
    save_file(tensors, path)
    return name


def another_quantisation(folder: Path, chance: random.Random) -> Culprits:
    changes = [{"quant_method": "awq"}, {"weight_block_size": [1, 128]}, {"fmt": "e5m2"}, {"weight_block_size": None}]
    change = chance.choice([None, [], {}, *(fp8_checkpoint.CONFIG | change for change in changes)])
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=change))
    return "quantization_config"


HF = [two_spellings, one_file_beside_an_index, further_tensor]
FP8 = [
    *(wrong_scale, scales_of_another_shape, scales_of_another_dtype, lost_scales, scales_of_another_weight),
    *(another_quantisation, one_file_beside_an_index),
]
CASES = [*(("hf", damage) for damage in HF), *(("fp8", damage) for damage in FP8)]


KINDS = {  # every kind of damage that a converter has to stand, and the functions that do it
    "truncated": "truncated",
    "swapped": "swapped_shards chunks_swapped",
    "renamed": "renamed renamed_tensor entry_renamed",
    "duplicated": "doubled_tensor two_spellings",
    "wrong dtype": "wrong_dtype converted_tensor",
    "wrong shape": "wrong_shape reshaped_tensor",
    "NaN where a scale should be": "wrong_scale",
    "hostile index": "index_points_elsewhere index_names_another",
    "hostile pickle": "hostile_pickle hostile_tensor huge_pickle pickle_that_changes_classes",
    "cyclic symlink": "cyclic_link",
    "pipe or device": "a_pipe_instead a_device_instead",
    "empty file": "emptied",
    "huge header": "huge_header deep_header",
}


def test_there_are_hundreds_of_inputs_of_every_kind(sound, tmp_path):
    """All different: counted by what lies in the folders."""
    folders = {kind: sound[kind].folder for kind in sound} | {"megatron": sound["hf"].megatron}
    found = set()
    for kind, damage in [*test_hostile.CASES, *CASES]:
        for number in range(test_hostile.ROUNDS):
            damaged = tmp_path / "damaged"
            make_damaged(kind, damage, number, folders[kind], damaged)
            found.add(fingerprint(damaged))
            shutil.rmtree(damaged)
    assert len(found) >= 300
    done = {damage.__name__ for _, damage in [*test_hostile.CASES, *CASES]}
    assert set(" ".join(KINDS.values()).split()) <= done


def fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(os.fsencode(path.relative_to(folder)))
        digest.update(str(path.readlink()).encode() if path.is_symlink() else b"")
        digest.update(path.read_bytes() if path.is_file() and not path.is_symlink() else b"")
    return digest.hexdigest()


IDS = [f"{kind}-{damage.__name__}" for kind, damage in CASES]


@pytest.mark.parametrize(("kind", "damage"), CASES, ids=IDS)
def test_damage_is_refused_by_name_or_changes_nothing(kind, damage, sound, tmp_path):
    check(kind, damage, sound[kind], tmp_path)


@pytest.mark.parametrize(("kind", "damage"), CASES, ids=IDS)
def test_damage_is_told_or_harmless_to_those_who_only_read(kind, damage, sound, tmp_path):
    check_readers(kind, damage, sound[kind], tmp_path)
