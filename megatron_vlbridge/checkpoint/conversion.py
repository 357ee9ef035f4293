"""One import or export: planned from headers, shown to the user, run, checked and renamed to its target."""

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from megatron_vlbridge.checkpoint.stream.checksums import read_origin, write_checksums
from megatron_vlbridge.checkpoint.stream.digest import digest_range
from megatron_vlbridge.checkpoint.stream.engine import Options, Writer, run
from megatron_vlbridge.checkpoint.stream.staging import (
    current,
    earlier_work,
    existing_parent,
    first_difference,
    is_free,
    staged_folder,
    sweep,
)
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Plan, TensorSpec

_VERSION = 3  # of the format of part files and blocks; part files of another version are not continued
_HEAD_BYTES = 64 * 2**10
_SPARE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Conversion(ABC):
    """What an import or export will do. Nothing has been written; every tensor of both sides is accounted for.

    `kind` is `import` or `export`. `notes` say what else than a plain copy will be done; `options` are those that
    decide the result, under their names on the command line.
    """

    kind: ClassVar[str]
    architecture: str
    source: Path
    target: Path
    plan: Plan
    writer: Writer
    source_files: tuple[Path, ...]
    side_files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @abstractmethod
    def complete(self, folder: Path) -> None:
        """Add the files beside the weights."""

    @abstractmethod
    def check(self, folder: Path) -> None:
        """Read the written headers back. Raises VLBridgeError where they are not what was to be written."""

    @property
    def nbytes(self) -> int:
        """Bytes of weights to be written."""
        return sum(self.writer.sizes)

    def summary(self, options: Options | None = None) -> dict[str, Any]:
        """The plan in JSON's types: sizes in bytes, threads, the most memory that blocks take."""
        options = options or Options()
        threads = options.threads(self.writer.block_bytes)
        return {
            "kind": self.kind,
            "architecture": self.architecture,
            "source": str(self.source),
            "target": str(self.target),
            "hf_tensors": len(self.plan.hf),
            "megatron_tensors": len(self.plan.megatron),
            "bytes": self.nbytes,
            "free_bytes": free_bytes(self.target),
            "parts": len(self.writer.sizes),
            "workers": threads,
            "memory_bytes": options.needed(self.writer.block_bytes, threads),
            "notes": [*self.notes, *self.plan.notes],
        }

    def run(self, options: Options | None = None, *, resume: bool = False) -> Path:
        """Write the result, and return its folder. With `resume`, a result that is complete is left as it is.

        Raises VLBridgeError where the target is taken or is being written, the disk is too small or fails, a file of
        the source is damaged, and where an interrupted run left work that may not be, or cannot be, continued.
        """
        options = options or Options()
        options.threads(self.writer.block_bytes)
        if resume and self.is_complete():
            sweep(self.target)
            return self.target
        origin = self.origin()
        with staged_folder(self.target, origin, resume=resume) as staging:
            self.check_space(staging.finished)
            finished = run(self.writer, staging, options)
            self.complete(staging.folder)
            self.check(staging.folder)
            write_checksums(staging.folder, finished, origin)
        return self.target

    def is_complete(self) -> bool:
        """Whether the target is already the result of this conversion: same source, same options, every file there.

        Raises VLBridgeError where it is the result of another conversion, naming the first difference, or where a file
        of it is missing or has another length.
        """
        if is_free(self.target):
            return False
        noted = read_origin(self.target)
        if noted is None:
            return False
        before, now = (_lasting(origin) for origin in (current(noted), json.loads(json.dumps(self.origin()))))
        if before != now:
            raise VLBridgeError(
                f"{self.target}: expected the result of this conversion, found that of another: "
                f"{first_difference(before, now)}. Use another name, or remove it if it is not needed."
            )
        return True

    def check_run(self, options: Options | None = None, *, resume: bool = False) -> None:
        """Raise what `run` would raise before the first byte; writes nothing."""
        options = options or Options()
        options.threads(self.writer.block_bytes)
        if not (resume and self.is_complete()):
            self.check_space(earlier_work(self.target, self.origin(), resume=resume))

    def check_space(self, finished: Container[int] = ()) -> None:
        """Reject a disk without space for the parts that are not `finished`, and the other files."""
        missing = sum(size for index, size in enumerate(self.writer.sizes) if index not in finished)
        missing += sum(path.stat().st_size for path in self.side_files) + _SPARE_BYTES
        free = free_bytes(self.target)
        if missing > free:
            raise VLBridgeError(
                f"{self.target}: expected {missing} bytes of free space, found {free}. Free some or use another disk."
            )

    def origin(self) -> dict[str, Any]:
        """What must not change between a run that was interrupted and the one that continues it."""
        moves = "\n".join(f"{move.hf} {move.megatron} {move.transposed}" for move in self.plan.table.moves)
        sides = (self.plan.hf, self.plan.megatron)
        specs = "\n".join(f"{name} {spec}" for side in sides for name, spec in side.items())
        return {
            "kind": self.kind,
            "options": dict(self.options),
            "version": _VERSION,
            "torch": torch.__version__,
            "rules": _digest(moves),
            "tensors": _digest(specs),
            "files": self._files(),
            "weights": _fingerprint(self.source_files),
            "other files": _fingerprint(self.side_files),
        }

    def _files(self) -> dict[str, str]:
        """Each file that is written in parts, with a digest of what lies where in it."""
        texts: dict[str, list[str]] = {}
        for index, (size, part) in enumerate(zip(self.writer.sizes, self.writer.parts, strict=True)):
            texts.setdefault(part.file, []).append(f"{index} {part.start} {size} {self.writer.contents(index)}")
        return {file: _digest("\n".join(parts)) for file, parts in texts.items()}


def _lasting(origin: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the content of a result, without what only decides whether its parts can be continued."""
    return {key: value for key, value in origin.items() if key not in ("version", "torch", "files")}


def free_bytes(target: Path) -> int:
    """Bytes that may be written where `target` will be."""
    return shutil.disk_usage(target if target.exists() else existing_parent(target)).free


def check_read_back(folder: Path, found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]) -> None:
    """Reject a result whose headers are not those that were to be written."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise VLBridgeError(
                f"{folder}: {name}: expected to read back {expected.get(name)}, found {found.get(name)}. "
                "Read-back mismatch: the storage returned different data. Use another disk."
            )


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """`bfloat16` and the like; None for None."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(paths: Iterable[Path]) -> dict[str, dict[str, int | str]]:
    """Size, first bytes and times of each file, by its name or, if another has it, path; of a link's target."""
    result: dict[str, dict[str, int | str]] = {}
    for path in paths:
        status = path.stat()
        result[str(path) if path.name in result else path.name] = {
            "size": status.st_size,
            "first bytes": digest_range(path, 0, _HEAD_BYTES, "sha256").value,
            "modified": status.st_mtime_ns,
            # It cannot be set back. The inode number would add nothing, and some network mounts assign a new one.
            "changed (content, rights or links)": status.st_ctime_ns,
        }
    return result
