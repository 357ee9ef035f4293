"""Results that appear complete or not at all, and work of a killed run that the next one continues.

While the target `name` is written, the hidden folder `.name.vlbridge` is beside it: `result/` becomes the target by one
rename, `journal.jsonl` has the origin and the finished parts, `lock` excludes other runs.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron_vlbridge.checkpoint.stream.parts import Part
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.locks import locked

_FORMER_OPTIONS = {"--leave-out": "--ignore"}


class Staging:
    """The work folder of one run: `folder` becomes the result, `finished` are the parts that are done."""

    def __init__(self, work: Path, finished: Mapping[int, Part]) -> None:
        self.folder, self.finished = work / "result", dict(finished)
        self._journal = work / "journal.jsonl"

    def note(self, part: Part) -> None:
        """Append a finished part to the journal."""
        with self._journal.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(part.as_json()) + "\n")
        self.finished[part.index] = part


@contextmanager
def staged_folder(target: Path, origin: Mapping[str, Any], *, resume: bool = False) -> Iterator[Staging]:
    """A folder to work in; flushed and renamed to `target` at the end.

    `target` must not exist, or be an empty folder. `origin` is what the result is made from and how, in JSON's
    types; work is continued only where it is the same. After an error or an interruption, finished parts are kept for
    a run with `resume`; if there are none, nothing is kept.

    Raises VLBridgeError where `target` is taken, another run is writing it, an interrupted run's work is there and
    `resume` is false or the origin has changed, and where the file system fails (a full disk, missing permissions).
    """
    work = _work_of(target)
    try:
        sweep(target)
        _check_free(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target, work):
            sweep(target)
            _check_free(target)
            staging = _begin(target, work, origin, resume)
            try:
                yield staging
                sync_tree(staging.folder)
                _check_free(target)
                staging.folder.rename(target)  # replaces an empty folder; fails if it is no longer empty
                sync(target.parent)
            except (VLBridgeError, OSError) as error:
                text = str(error) if isinstance(error, VLBridgeError) else write_failure(target, error)
                raise VLBridgeError(f"{text} {_what_is_left(work, staging)}") from error
            except BaseException:
                _what_is_left(work, staging)
                raise
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise VLBridgeError(write_failure(target, error)) from error


def write_failure(target: Path, error: OSError) -> str:
    """The message where a result cannot be written."""
    return f"{target}: expected to write it, found: {error}. Check free space and permissions, and retry."


def earlier_work(target: Path, origin: Mapping[str, Any], *, resume: bool = False) -> dict[int, Part]:
    """The finished parts that `staged_folder` would begin with; writes nothing.

    Raises VLBridgeError where it would: the target exists, another run writes it, its place cannot be written, an
    interrupted run's work is there that is not to be, or cannot be, continued.
    """
    work = _work_of(target)
    try:
        _check_free(target)
        place = existing_parent(target)
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            raise VLBridgeError(f"{target}: expected a folder with write permission, found {place}. Use another.")
        with ExitStack() as held:
            if (work / "lock").exists():
                held.enter_context(locked(target, work))
            return _continued(target, work, origin, resume)
    except OSError as error:
        raise VLBridgeError(write_failure(target, error)) from error


def existing_parent(target: Path) -> Path:
    """The folder that exists and in which `target`, with the folders around it, will be made."""
    return next(place for place in target.absolute().parents if place.exists())


def _work_of(target: Path) -> Path:
    return target.parent / f".{target.name}.vlbridge"


def _what_is_left(work: Path, staging: Staging) -> str:
    """Remove the work folder unless a part is finished; returns what was done as text."""
    if staging.finished:
        return f"{len(staging.finished)} finished parts are kept in {work}: continue with --resume, or remove it."
    shutil.rmtree(work, ignore_errors=True)
    return "Nothing was kept."


def sweep(target: Path) -> None:
    """Remove the work folder of a run that was killed after it had renamed its result."""
    work = _work_of(target)
    if not is_free(target) and work.exists() and not (work / "result").exists():
        shutil.rmtree(work, ignore_errors=True)


def is_free(target: Path) -> bool:
    """Whether a result may get this name: it is unused, or an empty folder that a rename can replace."""
    if target.is_symlink() or target.is_mount() or target.name in ("", ".."):
        return False
    try:
        return not target.exists() or (target.is_dir() and not any(target.iterdir()))
    except PermissionError:
        return False


def _check_free(target: Path) -> None:
    if not is_free(target):
        found = "a mount point" if target.is_mount() else "something there"
        raise VLBridgeError(
            f"{target}: expected a name that is free, or an empty folder, found {found}. Use another name, or remove "
            "it if it is not needed."
        )


def _begin(target: Path, work: Path, origin: Mapping[str, Any], resume: bool) -> Staging:
    """An empty result and a new journal, or what an interrupted run with the same origin left."""
    journal = work / "journal.jsonl"
    finished = _continued(target, work, origin, resume)
    try:
        if not finished:
            shutil.rmtree(work / "result", ignore_errors=True)
        (work / "result").mkdir(exist_ok=True)  # a run may have been killed just after renaming its result
        lines = [json.dumps(origin), *(json.dumps(part.as_json()) for part in finished.values())]
        fresh = work / "journal.new"
        fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")  # without a line that a kill may have truncated
        fresh.replace(journal)
    except OSError:
        if not finished:
            shutil.rmtree(work, ignore_errors=True)
        raise
    return Staging(work, finished)


def _continued(target: Path, work: Path, origin: Mapping[str, Any], resume: bool) -> dict[int, Part]:
    """The parts that an interrupted run has finished. Raises VLBridgeError where they must not be continued."""
    before, finished = _read_journal(work / "journal.jsonl")
    if finished and not resume:
        raise VLBridgeError(
            f"{target}: expected no earlier work, found {len(finished)} finished parts of an interrupted run in "
            f"{work}. Continue it with --resume, or remove that folder."
        )
    if finished and before != origin:
        changed = first_difference(before, origin)
        raise VLBridgeError(
            f"{target}: expected to continue from the same source with the same options, found {changed}. "
            f"Give the source and the options of that run, or remove {work} and begin again."
        )
    return finished


def _read_journal(path: Path) -> tuple[Any, dict[int, Part]]:
    """Origin and finished parts; all after a line that a kill has truncated counts as not done."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    finished: dict[int, Part] = {}
    try:
        origin = current(json.loads(lines[0])) if lines else None
        for line in lines[1:]:
            part = Part.from_json(json.loads(line))
            finished[part.index] = part
    except (json.JSONDecodeError, TypeError, KeyError, ValueError):
        if not finished:
            return None, {}
    return origin, finished


def current(origin: Any) -> Any:
    """An origin that an earlier version may have noted, with the options' present names."""
    options = origin.get("options") if isinstance(origin, dict) else None
    if not isinstance(options, dict):
        return origin
    return {**origin, "options": {_FORMER_OPTIONS.get(name, name): value for name, value in options.items()}}


def first_difference(before: Any, now: Any, where: str = "") -> str:
    """The first place in which two origins differ, as text. Options have the names of the command line."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            if before.get(key) != now.get(key):
                inner = f"{where}.{key}" if where not in ("", "options") else str(key)
                return first_difference(before.get(key), now.get(key), inner)
    shown, former = ("nothing" if value is None else f"{value!r:.120}" for value in (now, before))
    return f"{where or 'origin'} {shown} where it was {former}"


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below to the disk."""
    for place, _, files in os.walk(folder):
        for file in files:
            sync(Path(place) / file)
        sync(Path(place))


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
