"""The conversations of several sources, as one sequence."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from megatron_vlbridge.data.conversations import FileConversation, FileConversations
from megatron_vlbridge.data.sources.files.kinds import open_records
from megatron_vlbridge.data.sources.lazy import LazySequence
from megatron_vlbridge.data.sources.meta import Source, read_meta
from megatron_vlbridge.data.sources.sampling import Share
from megatron_vlbridge.errors import VLBridgeError


class Mixture(LazySequence[FileConversation]):
    """The conversations of the `parts`, one after the other; `shares` has the weight of each part."""

    def __init__(self, parts: Sequence[FileConversations], sources: Sequence[Source]) -> None:
        self.parts = parts
        self._starts = [0, *accumulate(map(len, parts))]
        bounds = zip(pairwise(self._starts), sources, strict=True)
        self.shares = [Share(begin, end, source.weight) for (begin, end), source in bounds]

    def __len__(self) -> int:
        return self._starts[-1]

    def item(self, index: int) -> FileConversation:
        """The conversation at an index of at least 0."""
        part = bisect_right(self._starts, index) - 1
        return self.parts[part][index - self._starts[part]]


def source_names(conversations: Sequence[Any]) -> list[str]:
    """The files of the sources of conversations, or "conversations" if they come from none."""
    parts = conversations.parts if isinstance(conversations, Mixture) else [conversations]
    return [str(getattr(part, "path", "conversations")) for part in parts]


def open_data(
    path: str | Path, split: str = "train", *, literal_tags: bool = False, cache: str | Path | None = None
) -> Mixture | None:
    """Open the sources of a split, "train" or "valid", of a YAML file (see `meta.read_meta`) or a single file.

    The result is the first argument of `dataset.PackedConversations`. Each conversation is read when it is requested;
    its errors name the file and the line. For `literal_tags` and `cache` see `conversations.read_conversations`. None
    if the file has no such split.

    Raises VLBridgeError: as `meta.read_meta`; a file cannot be read, is of another kind, has no conversation, or is
    read by two sources.
    Example: `open_data("meta.yaml")[0].location` is "train data a.jsonl, line 1".
    """
    sources = read_meta(path).get(split)
    if sources is None:
        return None
    name = "validation" if split == "valid" else split
    parts = [_open(source, name, literal_tags, cache) for source in sources]
    times = Counter(file.resolve() for part in parts for file in part.records.files)
    if twice := [file for file, count in times.items() if count > 1]:
        raise VLBridgeError(f"{path}: {split}: {twice[0]} is read by two sources; name it once")
    return Mixture(parts, sources)


def _open(source: Source, split: str, literal_tags: bool, cache: str | Path | None) -> FileConversations:
    name = f"{split} data {source.path}"
    records = open_records(source.path, name=name, cache=cache)
    return FileConversations(
        records, source.path, source.media, form=source.form, ignore=source.ignore, literal_tags=literal_tags
    )
