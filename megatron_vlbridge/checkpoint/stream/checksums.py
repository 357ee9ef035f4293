"""The manifest of a result: the checksums of its files, by which damage is found without the source."""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_vlbridge.checkpoint.comparison import Difference, Report
from megatron_vlbridge.checkpoint.formats import TRACKER
from megatron_vlbridge.checkpoint.stream.digest import ALGORITHM, ALGORITHMS, Digest, digest_range
from megatron_vlbridge.checkpoint.stream.json_file import MAX_SIZE, load_json_object
from megatron_vlbridge.checkpoint.stream.parts import Part
from megatron_vlbridge.errors import VLBridgeError

CHECKSUMS = "vlbridge-checksums.json"


def write_checksums(folder: Path, finished: Sequence[Part], origin: Mapping[str, Any]) -> None:
    """Note the checksums of all files below: the parts' own, and those of the small files now.

    `origin` (see `staged_folder`) is noted beside them: what the result was made from.
    """
    files: dict[str, list[tuple[int, int, str]]] = {}
    for part in sorted(finished, key=lambda part: (part.file, part.start)):
        assert part.digest is not None
        assert part.digest.algorithm == ALGORITHM
        files.setdefault(part.file, []).append((part.start, part.length, part.digest.value))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # A run that saves here rewrites the tracker; the checksums may be those of a run that was killed after them.
        if path.is_file() and name not in files and name not in (TRACKER, CHECKSUMS):
            size = path.stat().st_size
            files[name] = [(0, size, digest_range(path, 0, size).value)]
    text = json.dumps({"version": 2, ALGORITHM: files, "origin": origin}, indent=1)
    (folder / CHECKSUMS).write_text(text + "\n", encoding="utf-8")


def read_origin(folder: Path) -> dict[str, Any] | None:
    """What a result was made from, None where the folder is not a result or does not say it.

    Raises VLBridgeError, naming the file, where one of its files is missing or has another length.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    origin = load_json_object(path).get("origin")
    for name, parts in _read_checksums(path).items():
        expected = sum(part.length for part in parts)
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != expected:
            text = "no such file" if found is None else str(found)
            raise VLBridgeError(
                f"{folder / name}: expected {expected} bytes, as it was written, found {text}. "
                f"Use another name, or remove {folder} and convert again."
            )
    return origin if isinstance(origin, dict) else None


def verify_checksums(folder: str | Path) -> Report:
    """Compare the files of a result with the checksums that were noted when it was written.

    Each file that is missing, of another length or changed is a difference. Files that a training run has added are
    not read.

    Raises VLBridgeError where the folder has no checksums, or they are damaged.
    Example: `verify_checksums("qwen3-vl-2b-megatron").equal`.
    """
    folder = Path(folder)
    files = _read_checksums(folder / CHECKSUMS)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(lambda item: _check_file(folder, *item), files.items()))
    differences = [difference for of_file in found for difference in of_file]
    nbytes = sum(part.length for parts in files.values() for part in parts)
    return Report(str(folder), str(folder / CHECKSUMS), len(files), nbytes, tuple(differences), unit="files")


def _check_file(folder: Path, name: str, parts: Sequence[Part]) -> list[Difference]:
    length, path = sum(part.length for part in parts), folder / name
    try:
        size = path.stat().st_size
        if not path.is_file():  # reading a pipe may never end
            return [Difference(name, "expected a regular file, found another kind")]
        if size != length:
            return [Difference(name, f"expected {length} bytes, found {size}")]
        changed = [part for part in parts if not part.is_intact(folder)]
    except OSError as error:
        return [Difference(name, f"expected a readable file, found: {error}")]
    return [
        Difference(name, f"bytes {part.start} to {part.start + part.length} are not those written") for part in changed
    ]


def _read_checksums(path: Path) -> dict[str, list[Part]]:
    """The parts of each file; earlier versions wrote SHA-256."""
    if not path.is_file():
        raise VLBridgeError(f"{path}: expected checksums, found none. Name a second folder to compare with.")
    content = load_json_object(path)
    found = [name for name in ALGORITHMS if name in content]
    if len(found) != 1:
        keys = ", ".join(content) or "nothing"
        raise VLBridgeError(
            f"{path}: expected checksums under one of {', '.join(ALGORITHMS)}, found {keys:.80}. "
            "Copy the file again, or verify with the version that wrote it."
        )
    files = content[found[0]]
    result: dict[str, list[Part]] = {}
    for name, ranges in files.items() if isinstance(files, dict) else ():
        outside = ".." in Path(name).parts or Path(name).is_absolute()
        if outside or not isinstance(ranges, list) or not all(map(_is_range, ranges)):
            raise VLBridgeError(f"{path}: {name}: expected ranges with their checksums, found {ranges!r:.80}.")
        result[name] = [
            Part(index, name, start, length, digest=Digest(found[0], value))
            for index, (start, length, value) in enumerate(ranges)
        ]
    if not result:
        raise VLBridgeError(f"{path}: expected files with their checksums, found {files!r:.80}.")
    return result


def _is_range(value: Any) -> bool:
    plain = isinstance(value, list) and [type(item) for item in value] == [int, int, str]
    return plain and min(value[:2]) >= 0 and sum(value[:2]) < MAX_SIZE
