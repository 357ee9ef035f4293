"""Headers of safetensors files, read without trust and written."""

import json
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import torch

from megatron_vlbridge.checkpoint.stream.json_file import MAX_HEADER, are_sizes, load_json_object, regular_size
from megatron_vlbridge.checkpoint.stream.raw import Stored
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import TensorSpec

_BY_CODE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: name for name, dtype in _BY_CODE.items()}


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of one file, in the order of the data, after checking the header against the file's size."""
    try:
        size = regular_size(path)
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise VLBridgeError(
                    f"{path}: expected a header that fits into the file's {size} bytes, found a length of {length}. "
                    "The file is truncated or no safetensors file: fetch it again."
                )
            text = stream.read(length)
    except OSError as error:
        raise VLBridgeError(f"{path}: expected a readable file, found: {error}. Fetch the file again.") from error
    header = load_json_object(path, text)
    header.pop("__metadata__", None)
    entries = sorted((_parse_entry(path, name, entry) for name, entry in header.items()), key=lambda item: item[:2])
    position = 0
    for start, end, name, _ in entries:
        if start != position:
            raise VLBridgeError(
                f"{path}: {name}: expected data at byte {position}, found {start}. Fetch the file again."
            )
        position = end
    if position != size - 8 - length:
        raise VLBridgeError(
            f"{path}: expected {position} bytes of data after the header, found {size - 8 - length}. "
            "The file is truncated or damaged: fetch it again."
        )
    return {name: Stored(path, 8 + length + start, spec) for start, _, name, spec in entries}


def _parse_entry(path: Path, name: str, entry: object) -> tuple[int, int, str, TensorSpec]:
    """`(start, end, name, spec)` of one header entry."""
    values = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = values.get("dtype"), values.get("shape"), values.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BY_CODE:
        raise VLBridgeError(f"{path}: {name}: expected a dtype of {', '.join(_BY_CODE)}, found {dtype!r}.")
    if not (are_sizes(shape, list) and are_sizes(offsets, list) and len(offsets) == 2):
        raise VLBridgeError(f"{path}: {name}: expected a shape and two data offsets, found {entry!r:.120}.")
    spec = TensorSpec(tuple(shape), _BY_CODE[dtype])
    if offsets[1] - offsets[0] != spec.nbytes:
        raise VLBridgeError(
            f"{path}: {name}: expected {spec.nbytes} bytes for {spec}, found {offsets[1] - offsets[0]}. "
            "The header is damaged: fetch the file again."
        )
    return offsets[0], offsets[1], name, spec


def encode_header(tensors: Mapping[str, TensorSpec]) -> bytes:
    """What a file begins with: the length of the JSON, and the JSON."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends = list(accumulate((spec.nbytes for spec in tensors.values()), initial=0))
    for (name, spec), start, end in zip(tensors.items(), ends[:-1], ends[1:], strict=True):
        header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
