"""The file of --data: which sources a split has, and how each is read."""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from megatron_vlbridge.data.media import shown
from megatron_vlbridge.data.sources.forms.registry import AUTO, Form, find_form
from megatron_vlbridge.errors import VLBridgeError

SPLITS = ("train", "valid")
KEYS = ("path", "form", "media", "weight", "columns", "ignore")
SUFFIXES = (".yaml", ".yml")
MAX_WEIGHT = 100_000
EXAMPLE = "{path: a.jsonl, form: sharegpt, media: images, weight: 0.5}"


@dataclass(frozen=True)
class Source:
    """A file of conversations: `form` None detects that of each record, `media` is the folder of its paths.

    An epoch takes each conversation `weight` times (see `sampling.epoch_members`). Keys in `ignore` are left out.
    """

    path: Path
    form: Form | None
    media: Path
    weight: Fraction = Fraction(1)
    ignore: tuple[str, ...] = ()


def read_meta(path: str | Path) -> dict[str, list[Source]]:
    """The sources of each split of a YAML file, or of a single file of conversations, which is a source of "train".

    Paths are relative to the folder of the YAML file; those of media to `media`, or else to the folder of their source.

    Raises VLBridgeError: a file or folder does not exist, an unknown, missing or duplicate key, an invalid value, the
    same file twice in a split. The error names the split and the source, from 1.
    Example: of `train: [{path: a.jsonl, weight: 0.5}]`, `read_meta("meta.yaml")["train"][0].weight` is 1/2.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        try:
            path.stat()
        except FileNotFoundError:
            raise VLBridgeError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise VLBridgeError(f"{path}: cannot read the file ({getattr(error, 'strerror', error)})") from error
        return {"train": [Source(path, None, path.parent)]}
    value = _load(path)
    if not isinstance(value, dict) or not value:
        raise VLBridgeError(f"{path}: expected sources under 'train' and 'valid', found {shown(value)}")
    _check_keys(str(path), value, SPLITS)
    splits: dict[str, list[Source]] = {}
    for split, sources in value.items():
        name = f"{path}: {split}"
        if not isinstance(sources, list) or not sources:
            raise VLBridgeError(f"{name}: expected a list of sources such as [{EXAMPLE}], found {shown(sources)}")
        splits[split] = [
            _source(f"{name}, source {number}", source, path.parent) for number, source in enumerate(sources, 1)
        ]
        files = [source.path.resolve() for source in splits[split]]
        if twice := [file for file in files if files.count(file) > 1]:
            raise VLBridgeError(f"{name}: {twice[0]} is there twice; give it a weight instead")
    return splits


class _Loader(yaml.SafeLoader):
    """A safe loader that rejects duplicate keys, of which PyYAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            line = node.start_mark.line + 1
            raise VLBridgeError(f"key {twice[0]!r} occurs twice in the mapping from line {line}")
        return super().construct_mapping(node, deep)


def _construct_number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """A decimal number: YAML 1.1 also takes 010 for 8, and 1:30 for 90."""
    text = loader.construct_scalar(node)
    if ":" in text or re.fullmatch(r"[-+]?0\w+", text):
        line = node.start_mark.line + 1
        raise VLBridgeError(f"line {line}: expected a decimal number, found {text}; quote it if it is a text")
    is_int = node.tag.endswith(":int")
    number: int | float = loader.construct_yaml_int(node) if is_int else loader.construct_yaml_float(node)
    return number


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct_number)


def _load(path: Path) -> Any:
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, _Loader)
    except VLBridgeError as error:
        raise VLBridgeError(f"{path}: {error}") from error
    except OSError as error:
        raise VLBridgeError(f"{path}: cannot read the file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise VLBridgeError(f"{path}: expected YAML, found an error: {' '.join(str(error).split())}") from error


def _source(name: str, value: Any, folder: Path) -> Source:
    if not isinstance(value, dict):
        raise VLBridgeError(f"{name}: expected a mapping such as {EXAMPLE}, found {shown(value)}")
    _check_keys(name, value, KEYS)
    for key in ("path", "form", "media"):
        if not isinstance(value.get(key, ""), str):
            raise VLBridgeError(f"{name}: expected '{key}' to be a string, found {shown(value[key])}")
    if not value.get("path"):
        raise VLBridgeError(f"{name}: 'path' is missing, expected a mapping such as {EXAMPLE}")
    place, name = name, f"{name} ({value['path']})"
    path = folder / value["path"]
    media = folder / value["media"] if "media" in value else path.parent
    try:
        path.stat()
        if not media.is_dir():
            raise VLBridgeError(f"{name}: 'media' is not a folder: {media}")
    except FileNotFoundError:
        raise VLBridgeError(f"{name}: no file {path}") from None
    except OSError as error:
        raise VLBridgeError(f"{name}: cannot read {error.filename} ({error.strerror})") from error
    except ValueError as error:  # a null byte, or no Unicode text
        if isinstance(error, VLBridgeError):
            raise
        raise VLBridgeError(f"{place}: expected a path, found an error: {error}") from error
    ignore = value.get("ignore", [])
    if not isinstance(ignore, list) or not all(isinstance(key, str) for key in ignore):
        raise VLBridgeError(f"{name}: expected 'ignore' to be a list of keys, found {shown(ignore)}")
    try:
        form = find_form(value.get("form", AUTO), value.get("columns"))
    except VLBridgeError as error:
        raise VLBridgeError(f"{name}: {error}") from error
    return Source(path, form, media, _weight(name, value.get("weight", 1)), tuple(ignore))


def _weight(name: str, value: Any) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_WEIGHT:
        # YAML takes a number without a dot and a sign in the exponent for a string.
        is_number = isinstance(value, str) and re.fullmatch(r"(\d+\.?|\d*\.\d+)[eE][+-]?\d{1,2}", value)
        hint = f"; write it as {Decimal(value):f}" if is_number and 0 < Decimal(value) <= MAX_WEIGHT else ""
        raise VLBridgeError(
            f"{name}: expected 'weight' to be a number above 0 and up to {MAX_WEIGHT:,}, found {shown(value)}{hint}"
        )
    return Fraction(str(value))


def _check_keys(name: str, value: dict[Any, Any], known: tuple[str, ...]) -> None:
    if unknown := [key for key in value if key not in known]:
        raise VLBridgeError(f"{name}: unknown key {unknown[0]!r} (known: {', '.join(map(repr, known))})")
