"""The tokens, media and failures of conversations, and some conversations as tokens that are supervised or not."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from PIL import Image
from transformers import ProcessorMixin

from megatron_vlbridge.data.chat import Sample
from megatron_vlbridge.data.images import MediaOptions, read_image
from megatron_vlbridge.data.lengths.measure import location
from megatron_vlbridge.data.lengths.turn_counts import TurnCounts
from megatron_vlbridge.data.media import Conversation, with_files
from megatron_vlbridge.data.messages import message_parts
from megatron_vlbridge.data.processors.interface import CHATML
from megatron_vlbridge.errors import VLBridgeError

THUMBNAIL = 160  # the longer side in pixels
SHOWN_IMAGES = 8  # of a conversation
STEP = 500  # conversations


class Piece(NamedTuple):
    """Consecutive tokens as text, all of them supervised or none."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Shown:
    """A conversation to look at: its location, its tokens, and its first images as `data:` URLs.

    `hidden` is what is not shown: further images, and video files.
    """

    location: str
    pieces: tuple[Piece, ...]
    images: tuple[str, ...]
    hidden: int


@dataclass
class Summary:
    """The conversations of one source: of those that can be encoded `lengths` and `patches`, of the others `failures`.

    `tokens` and `supervised` count by role. `failures` are error texts with file and line. Of the `assistant_turns`
    those in `excluded`, with file, line and reason, and `skipped_turns` are not learned (see `TurnCounts`).
    """

    name: str
    lengths: list[int] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)
    images: int = 0
    videos: int = 0
    assistant_turns: int = 0
    excluded: list[str] = field(default_factory=list)
    skipped_turns: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    supervised: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    @property
    def turns(self) -> TurnCounts:
        """The assistant turns, and the first that is excluded."""
        first = self.excluded[0] if self.excluded else ""
        return TurnCounts(self.assistant_turns, len(self.excluded), self.skipped_turns, first)


def summarize(
    name: str,
    conversations: Sequence[Conversation],
    encode: Callable[[Conversation], Sample],
    processor: ProcessorMixin,
    *,
    show: int = 0,
    media: MediaOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Encode every conversation and count; `show` of them, evenly spread, are kept to look at.

    `progress` is called with the numbers of those done and of all after each `STEP`, and at the end.
    A conversation that cannot be encoded is a failure, never an exception.
    """
    summary = Summary(name)
    chosen = {round((place + 0.5) * len(conversations) / show - 0.5) for place in range(show)}
    for index in range(len(conversations)):
        if index and index % STEP == 0:
            progress(index, len(conversations))
        try:
            conversation = conversations[index]
        except VLBridgeError as error:
            summary.failures.append(str(error))
            continue
        where = location(conversation, index)
        try:
            sample = encode(conversation)
            images, hidden = _thumbnails(conversation, media) if index in chosen else ([], 0)
        except VLBridgeError as error:
            summary.failures.append(f"{where}: {error}")
            continue
        _count(summary, sample, processor)
        summary.assistant_turns += sum(message["role"] == "assistant" for message in conversation)
        summary.excluded += [f"{where}, {turn}" for turn in sample.excluded_turns]
        summary.skipped_turns += len(sample.skipped_turns)
        if index in chosen:
            pieces = tuple(supervised_pieces(sample, processor))
            summary.shown.append(Shown(where, pieces, tuple(images), hidden))
    progress(len(conversations), len(conversations))
    return summary


def totals(summary: Summary) -> dict[str, int]:
    """What the summary counts, by name."""
    return {
        "conversations": len(summary.lengths),
        "failures": len(summary.failures),
        "images": summary.images,
        "videos": summary.videos,
        "tokens": sum(summary.lengths),
        "longest": max(summary.lengths, default=0),
        "supervised": summary.supervised.total(),
        "assistant turns": summary.assistant_turns,
        "excluded turns": len(summary.excluded),
        "skipped turns": summary.skipped_turns,
    }


def supervised_pieces(sample: Sample, processor: ProcessorMixin) -> list[Piece]:
    """The tokens as text, split where the loss begins and ends; n placeholders in a row are one with `x n`.

    Tokens are decoded together, as several may be one character.
    """
    decode, placeholders = processor.tokenizer.decode, (processor.image_token_id, processor.video_token_id)
    pieces = []
    tokens = zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True)
    for supervised, run in groupby(tokens, key=lambda token: token[1]):
        text = ""
        ids = (token for token, _ in run)
        for placeholder, group in groupby(ids, key=lambda token: token if token in placeholders else None):
            members = list(group)
            text += decode(members) if placeholder is None else f"{decode([placeholder])} x {len(members)} "
        pieces.append(Piece(text, supervised))
    return pieces


def _count(summary: Summary, sample: Sample, processor: ProcessorMixin) -> None:
    summary.lengths.append(len(sample.input_ids))
    grids = [*sample.image_grid_thw.tolist(), *sample.video_grid_thw.tolist()]
    summary.patches.append(sum(frames * rows * columns for frames, rows, columns in grids))
    summary.images += len(sample.image_grid_thw)
    summary.videos += len(sample.video_grid_thw)
    start = processor.tokenizer.convert_tokens_to_ids(CHATML.starts[0])
    places = (sample.input_ids == start).nonzero().flatten().tolist()
    for begin, end in zip(places, [*places[1:], len(sample.input_ids)], strict=True):
        role = processor.tokenizer.decode(sample.input_ids[begin + 1 : begin + 8]).partition("\n")[0]
        summary.tokens[role] += end - begin
        summary.supervised[role] += int(sample.loss_mask[begin:end].sum())


def _thumbnails(conversation: Conversation, media: MediaOptions) -> tuple[list[str], int]:
    """The first images and video frames, scaled down, and how many further ones and video files there are."""
    sources: list[Any] = []
    files = 0
    parts = (part for message in conversation for part in message_parts(message))
    for part in (with_files(part, media) for part in parts):
        if part["type"] == "image":
            sources.append(part["image"])
        elif part["type"] == "video" and isinstance(part["video"], list):
            sources += part["video"]
        else:
            files += part["type"] == "video"
    shown = [_data_url(read_image(source, "image", media)) for source in sources[:SHOWN_IMAGES]]
    return shown, len(sources) - len(shown) + files


def _data_url(image: Image.Image) -> str:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
