"""Tensors of a Hugging Face folder that the user says to ignore, and notes of what is not read as the files have it."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_vlbridge.checkpoint.hf.reader import SafetensorsFolder
from megatron_vlbridge.errors import VLBridgeError

_SHOWN = 8


def ignored_tensors(folder: Path, names: Iterable[str], needed: Collection[str], patterns: Sequence[str]) -> list[str]:
    """Those of a folder's tensors that match the user's `patterns` (`rotary.*`, as in a shell).

    Raises VLBridgeError where a pattern matches no tensor, or one of those `needed` by the model.
    """
    names = list(names)
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        wanted = [name for name in matching if name in needed]
        if not matching or wanted:
            text = f"tensors of the model, such as {wanted[0]}" if wanted else "no tensor that it matches"
            raise VLBridgeError(
                f"{folder}: ignore: expected {pattern!r} to match tensors that are not part of the model, found "
                f"{text}. Name those that the error without this option lists."
            )
        found |= dict.fromkeys(matching)
    return list(found)


def read_notes(weights: SafetensorsFolder) -> Iterator[str]:
    """What is read otherwise than the files have it, for people."""
    yield from weights.renamed
    if weights.scaled:
        yield f"FP8 weights, dequantised to bfloat16 by their scales: {listed(weights.scaled)}"


def listed(names: Sequence[str]) -> str:
    """`2 tensors: a, b`, the first few by name."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}: {', '.join(names[:_SHOWN])}{more}"
