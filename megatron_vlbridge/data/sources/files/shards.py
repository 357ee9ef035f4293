"""Random access to the samples of WebDataset shards: tar files with the members of a sample one after the other."""

import io
import tarfile
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from itertools import accumulate, chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from megatron_vlbridge.data.sources.files.json_lines import JsonLines
from megatron_vlbridge.data.sources.files.json_values import parse_json, utf8_text
from megatron_vlbridge.data.sources.files.record_index import Rows
from megatron_vlbridge.data.sources.lazy import Records
from megatron_vlbridge.errors import VLBridgeError

MEDIA = {
    **dict.fromkeys(
        ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jfif", "jp2", "heic", "heif"), "images"
    ),
    **dict.fromkeys(("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "ts", "flv", "wmv", "3gp"), "videos"),
}
NO_CONTENT = (b"V", b"D")  # the label of a volume and the list of a folder, of GNU tar
_BLOCK = 512
_CHUNK = 1 << 20


class Shards(Records):
    """The samples of a tar file, or of all tar files in a folder.

    The record of a sample is its member `KEY.json`. If that names none of the images and videos of the sample, they are
    added to it as `images` and `videos`, in the order of the tar file. Any other member is added under its extension,
    a text as a string, so that it is rejected unless it is used or ignored.

    Raises VLBridgeError: a file is not a tar file, the members of a sample are not adjacent; when a sample is read: it
    has no JSON member, or names only some of its images and videos.
    Example: `Shards("shards")[6]["messages"]`.
    """

    def __init__(self, path: str | Path, *, name: str = "", cache: str | Path | None = None) -> None:
        path = Path(path)
        self.name = name or str(path)
        self.files = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        names = [f"{self.name}/{file.name}" if path.is_dir() else self.name for file in self.files]
        self._shards = [_Shard(file, name=one, cache=cache) for file, one in zip(self.files, names, strict=True)]
        self._starts = [0, *accumulate(map(len, self._shards))]
        self._last: tuple[int, dict[str, bytes]] = -1, {}

    def __len__(self) -> int:
        return self._starts[-1]

    def item(self, index: int) -> Any:
        """The record of a sample."""
        shard, place = self._find(index)
        return shard.item(place)

    def location(self, index: int) -> str:
        """The name of a sample in errors, counted from 1 in its shard: "shards/00.tar, sample 7"."""
        shard, place = self._find(index)
        return shard.location(place)

    def media(self, index: int, source: str, folder: Path) -> str | bytes:
        """The bytes of a member of the sample, by its name or path; a file in `folder` if it has no such member."""
        found = find_member(self._members(index), source)
        return super().media(index, source, folder) if found is None else found

    def check_used(self, index: int, sources: Collection[str]) -> None:
        """Reject a sample with images or videos that its messages do not use."""
        check_members_used(self._members(index), sources)

    def _members(self, index: int) -> dict[str, bytes]:
        """The members of a sample by path; those of the last sample are kept, as its images are read one by one."""
        last = self._last  # read once, as other threads may set it
        if last[0] != index:
            shard, place = self._find(index)
            last = self._last = index, shard.members(place)
        return last[1]

    def _find(self, index: int) -> tuple["_Shard", int]:
        number = bisect_right(self._starts, index) - 1
        return self._shards[number], index - self._starts[number]


class _Shard(JsonLines):
    unit = "sample"

    def members(self, index: int) -> dict[str, bytes]:
        """The members of a sample by path."""
        return _members(self._content(index))

    def _parse(self, content: bytes) -> Any:
        return sample_record(_members(content))

    def _scan(self, path: Path) -> Iterator[Rows]:
        try:
            yield np.array(list(scan_samples(path)), dtype=np.int64).reshape(-1, 3)
        except (tarfile.TarError, VLBridgeError) as error:
            raise VLBridgeError(f"{self.name}: expected a tar file of samples: {error}") from error


def scan_samples(path: Path) -> Iterator[tuple[int, int, int]]:
    """Begin, end and number of each sample: members whose paths are equal up to the first dot of the name.

    Raises tarfile.TarError: the file is not a tar file, or compressed; VLBridgeError: it is cut, or goes on after its
    end, has links, or the members of a sample are not adjacent.
    """
    seen: set[str] = set()
    last, begin, end = None, 0, 0
    with tarfile.open(path, "r:") as tar:
        while member := tar.next():
            _check_name(member.name)
            if member.isdir() or member.type in NO_CONTENT:
                continue
            if not member.isfile():
                raise VLBridgeError(
                    f"expected files, found a link or device {member.name!r}; write the file in its place (GNU tar: "
                    "--dereference --hard-dereference)"
                )
            key = _split(member.name)[0]
            if key != last:
                if last is not None:
                    yield begin, end, len(seen)
                if key in seen:
                    raise VLBridgeError(f"the members of the sample {key!r} are not adjacent")
                seen.add(key)
                last, begin = key, member.offset
            end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        after = tar.offset
    if last is not None:
        yield begin, end, len(seen)
    with path.open("rb") as file:
        file.seek(after)
        # tarfile takes a header that is cut for the end.
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise VLBridgeError(f"the file is cut after {after} bytes: expected a block of zeros at its end")
        while rest := file.read(_CHUNK):
            if rest.strip(b"\0"):
                raise VLBridgeError(
                    f"expected nothing after the end of the archive at byte {after}, found more; concatenate tar files "
                    "with `tar --concatenate`, not with cat"
                )


def _check_name(name: str) -> None:
    """A name that is not UTF-8 has surrogates in place of its bytes, and could not be printed."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise VLBridgeError(f"expected names of members in UTF-8, found {name!a}") from None


def _split(path: str) -> tuple[str, str]:
    """The key of a member, and its extension in lower case."""
    name = _name(path)
    stem, _, extension = name.partition(".")
    return path[: len(path) - len(name)] + stem, extension.lower()


def _name(path: str) -> str:
    return PurePosixPath(path).name


def _members(content: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None and member.name in found:
                raise VLBridgeError(f"expected each member once, found {member.name!r} twice in the sample")
            if file is not None:
                found[member.name] = file.read()
    return found


def find_member(members: dict[str, bytes], source: str) -> bytes | None:
    """The content of a member, by its path or its name."""
    return members.get(source) or {_name(path): content for path, content in members.items()}.get(source)


def sample_record(members: dict[str, bytes]) -> Any:
    """The record of a sample with these members, see `Shards` (VLBridgeError if it has none, or leaves media out)."""
    records = [path for path in members if _split(path)[1] == "json"]
    if len(records) != 1:
        raise VLBridgeError(f"expected one member that ends with .json, found {', '.join(records or members)}")
    record = parse_json(members[records[0]])
    if not isinstance(record, dict):
        return record
    names = {_name(text) for text in _texts(record)}
    media: dict[str, list[str]] = {"images": [], "videos": []}
    for path, content in members.items():
        extension = _split(path)[1]
        if kind := MEDIA.get(extension.rpartition(".")[2]):
            media[kind].append(path)
        elif extension in record:
            raise VLBridgeError(f"the sample has a member {path!r} and its .json the key {extension!r}: expected one")
        elif extension != "json":
            record[extension] = _text(path, content) if extension == "txt" else content
    named = {path: _name(path) in names for path in chain(*media.values())}
    if not any(named.values()):
        return record | {kind: paths for kind, paths in media.items() if paths}
    if not all(named.values()):
        left = next(path for path, is_named in named.items() if not is_named)
        raise VLBridgeError(f"the sample has a member {left!r} that its .json does not name, though it names others")
    return record


def _text(path: str, content: bytes) -> str:
    try:
        return utf8_text(content)
    except VLBridgeError as error:
        raise VLBridgeError(f"member {path!r}: {error}") from error


def check_members_used(members: Iterable[str], sources: Collection[str]) -> None:
    """Reject images and videos among the members of a sample that are none of the `sources` of its messages."""
    for path in members:
        if MEDIA.get(_split(path)[1].rpartition(".")[2]) and not {path, _name(path)} & set(sources):
            raise VLBridgeError(
                f"the sample has a member {path!r} that its messages do not use; name it where they use it, or leave "
                "it out of the shard"
            )


def _texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value but keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
