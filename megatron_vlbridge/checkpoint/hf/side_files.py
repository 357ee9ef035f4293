"""The files beside the weights of a Hugging Face folder: config, tokenizer, processor, licence."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_vlbridge.checkpoint.hf.portable_config import differences_in_4, make_portable
from megatron_vlbridge.checkpoint.stream.checksums import CHECKSUMS
from megatron_vlbridge.checkpoint.stream.json_file import is_plain, load_json_object
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError

SIDE_FOLDER = "hf"
MANIFEST = "vlbridge.json"

QUANTISATION = "quantization_config"
_DTYPE = re.compile(r'"(?:torch_)?dtype"\s*:\s*"([^"\\]*)"')
_MARK = "this one"
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def side_files(folder: Path) -> list[Path]:
    """Every file of a Hugging Face folder but the weights: config, tokenizer, processor, licence.

    Raises VLBridgeError for a name that cannot be printed, under which no checksum could be noted.
    """
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name not in (MANIFEST, CHECKSUMS)
        if not path.name.endswith(_WEIGHT_FILES)
    ]
    for path in found:
        if not is_plain(path.name):
            raise VLBridgeError(f"{folder}: expected printable names of files, found {path.name!r}. Rename the file.")
    return found


def copy_side_files(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    *,
    portable: Config | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Copy those files unchanged, but for what config.json says of weights that are no longer so.

    That is their `quantization`, and the dtype that it names, where all were converted to `dtype`. Where `portable` is
    given, what config.json means, it is written for transformers 4.57 too (`portable_config.py`).
    """
    target.mkdir(exist_ok=True)
    for path in side_files(source):
        if path.name == "config.json":
            (target / path.name).write_bytes(_config_of(path, dtype, portable, quantization))
        else:
            shutil.copyfile(path, target / path.name)


def _config_of(
    path: Path, dtype: torch.dtype | None, portable: Config | None, quantization: Mapping[str, Any] | None
) -> bytes:
    """The bytes of a config.json for weights with this quantization (None: none) and dtype (None: as it says)."""
    content, config = path.read_bytes(), load_json_object(path)
    changed = config.pop(QUANTISATION, None) is not None
    if quantization is not None:
        config[QUANTISATION], changed = quantization, True
    if portable is not None and any(differences_in_4(config, portable)):
        config, changed = make_portable(config, portable), True
    if changed:
        content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    if dtype is None:
        return content
    text = result = content.decode()
    for match in reversed(list(_DTYPE.finditer(text))):
        start, end = match.span(1)
        # Which part of the config a place belongs to is known only to a parser.
        if _MARK in _named_dtypes(json.loads(text[:start] + _MARK + text[end:])):
            result = result[:start] + str(dtype).removeprefix("torch.") + result[end:]
    return result.encode()


def _named_dtypes(config: dict[str, Any]) -> list[object]:
    """What a config names as the dtype of the model and of its two parts; others are not of these weights."""
    parts = (config, config.get("text_config"), config.get("vision_config"))
    return [part.get(key) for part in parts if isinstance(part, dict) for key in ("dtype", "torch_dtype")]
