"""The door for packed rows under context parallelism: whole, or already cut among the ranks by a framework."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
import torch.distributed as dist

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.layout.frames import Frames
from megatron_vlbridge.layout.vision_rows import ShardCounts, ShardedPack
from megatron_vlbridge.layout.zigzag import check_divisible
from megatron_vlbridge.model.inputs import (
    IGNORED,
    Media,
    PackedInputs,
    filler_token,
    grids_and_patches,
    refuse_outside_vocabulary,
)


@dataclass(frozen=True)
class Row:
    """A packed row as a framework hands it over.

    `tokens` int64 `[1, T]`: the whole pack, or this rank's zigzag part of it; `labels` `[1, T]` next tokens, -100 where
    no loss. `cu_seqlens` (of the whole pack, padding included) starts with 0 and ends with the pack's length;
    `lengths` are the segments' true lengths, by default the padded ones: padding at a segment's end is then taken for
    text, which changes no logits and no loss, since attention is causal and it has no label. All on the host.
    """

    tokens: torch.Tensor
    cu_seqlens: Sequence[int] | torch.Tensor
    media: Media = field(default_factory=Media)
    labels: torch.Tensor | None = None
    lengths: Sequence[int] | torch.Tensor | None = None


@dataclass(frozen=True)
class Said:
    """What a rank tells the others: why it cannot go on, or its counts and check sums of what all ranks must share."""

    failure: str | None = None
    shared: dict[str, int] = field(default_factory=dict)
    counts: ShardCounts | None = None


def row_inputs(make_row: Callable[[], Row], config: Config, cp_group: dist.ProcessGroup) -> PackedInputs:
    """A packed row as this context-parallel rank's inputs, whether the row is whole or cut already.

    One collective over `cp_group`, in which every rank takes part whatever its own row is like; no token travels. What
    `make_row` raises is heard by every rank too.

    Raises:
        VLBridgeError: on every rank of the group alike, where one rank's row cannot be made or is not fit, the ranks
            were given different segments or grids, or all placeholders together do not fit the grids.

    Example:
        >>> group = parallel_state.get_context_parallel_group()
        >>> inputs = row_inputs(lambda: Row(tokens, [0, 64, 96], media), config, group)
    """
    size, rank = cp_group.size(), cp_group.rank()
    if size == 1:
        return RankRow(make_row(), config, 1, 0).inputs([Said()])
    mine: RankRow | None = None
    cause: Exception | None = None
    try:
        mine = RankRow(make_row(), config, size, rank)
        said = mine.said
    except Exception as error:  # noqa: BLE001  the other ranks wait for this one: they must hear of anything
        cause = error
        said = Said(failure=str(error) or type(error).__name__)
    heard: list[Said] = [said] * size
    dist.all_gather_object(heard, said, group=cp_group)
    _refuse_failures(heard, cause)
    assert mine is not None
    return mine.inputs(heard)


@dataclass(frozen=True)
class RowLayout(BatchLayout):
    """A layout whose segments come with their padding: `padded` are the lengths that the framework gave them."""

    padded: tuple[int, ...] = ()

    @property
    def padded_lengths(self) -> tuple[int, ...]:
        """As they came, which may be more than context parallelism needs."""
        return self.padded

    @property
    def is_padding(self) -> torch.Tensor:
        """Which of this rank's tokens are padding: bool `[total / cp_size]`."""
        if self.lengths == self.padded:
            return torch.zeros(self.total // self.cp_size, dtype=torch.bool)
        return self.sources < 0

    @property
    def sources(self) -> torch.Tensor:
        """As of every layout; here segments have padding at their ends without context parallelism too."""
        if self.cp_size > 1:
            return super().sources
        lengths, padded = torch.tensor(self.lengths), torch.tensor(self.padded)
        runs = torch.stack((lengths, padded - lengths), dim=1).flatten()
        held = (torch.arange(len(runs)) % 2 == 0).repeat_interleave(runs)
        return torch.where(held, held.cumsum(0) - 1, -1)


class RankRow:
    """One rank's row, checked as far as the rank can alone; then `inputs` from what all ranks said.

    Raises:
        VLBridgeError: where the row's own parts do not fit each other.
    """

    def __init__(self, row: Row, config: Config, cp_size: int, cp_rank: int) -> None:
        segments = _segments(row.cu_seqlens)
        lengths = _true_lengths(row.lengths, segments)
        self.sharded = _is_shard(row.tokens, segments, cp_size)
        self._layout = RowLayout(lengths, sum(segments), cp_size, cp_rank, padded=segments)
        held = self._layout if self.sharded else replace(self._layout, cp_size=1, cp_rank=0)
        self._tokens, self._labels = _without_padding(row, held.is_padding, config)
        media = row.media
        images, videos, self._patches = grids_and_patches(media, config)
        self._per_segment = _integers(media.images_per_segment), _integers(media.videos_per_segment)
        self._kinds = torch.stack([self._tokens[0] == i for i in (config.image_token_id, config.video_token_id)])
        self._whole = None
        counts = None
        if self.sharded:
            _refuse_prediction_layers(config)
            self._pack = ShardedPack(segments, cp_size, images, videos, config.vision.spatial_merge_size)
            counts = self._pack.count(self._kinds)
        else:
            self._whole = self._from_whole(media, config)
        shared = {
            "a whole row or a part of it (T)": self.sharded,
            "cu_seqlens": segments,
            "lengths": lengths,
            "image grids": images,
            "video grids": videos,
            "images_per_segment, videos_per_segment": self._per_segment,
            "labels or none": row.labels is not None,
        }
        self.said = Said(shared={what: zlib.crc32(repr(x).encode()) for what, x in shared.items()}, counts=counts)

    def inputs(self, heard: Sequence[Said]) -> PackedInputs:
        """This rank's inputs, from what all ranks said (in the order of the ranks).

        Raises:
            VLBridgeError: where the ranks' rows do not fit each other; the same on every rank.
        """
        _refuse_different_rows(heard)
        if self._whole is not None:
            return self._whole
        counts = [said.counts for said in heard if said.counts is not None]
        self._pack.check(counts, *self._per_segment)
        places = self._pack.places(self._kinds, counts, self._layout.cp_rank)
        return PackedInputs(
            layout=self._layout,
            tokens=self._tokens,
            position_ids=places.position_ids[:, None],
            frames=Frames((*self._pack.image_grids, *self._pack.video_grids), self._pack.merge_size),
            patches=self._patches,
            vision_rows=places.vision_rows,
            labels=None if self._labels is None else self._labels.clamp(min=0),
            loss_mask=None if self._labels is None else (self._labels != IGNORED).float(),
            feature_rows=places.feature_rows,
        )

    def _from_whole(self, media: Media, config: Config) -> PackedInputs:
        """Padding stays where it is: it counts as text at its segment's end, only the layout knows better."""
        layout = BatchLayout.packed(self._layout.padded, self._layout.total)
        whole = PackedInputs.from_pack(layout, self._tokens, media, config, self._labels)
        part = whole.context_parallel(self._layout.cp_size, self._layout.cp_rank, config)
        return replace(part, layout=self._layout)


def _refuse_different_rows(heard: Sequence[Said]) -> None:
    for rank, said in enumerate(heard):
        for what, check_sum in said.shared.items():
            if check_sum != heard[0].shared[what]:
                raise VLBridgeError(
                    f"context-parallel ranks 0 and {rank} of {len(heard)} were given different rows: they differ in "
                    f"{what}. All ranks must get the same segments and grids, and a part of the same pack"
                )


def _refuse_failures(heard: Sequence[Said], cause: Exception | None) -> None:
    failures = [f"context-parallel rank {rank}: {said.failure}" for rank, said in enumerate(heard) if said.failure]
    if failures:
        raise VLBridgeError(
            f"{len(failures)} of {len(heard)} context-parallel ranks cannot take their row; " + "; ".join(failures)
        ) from cause


def _segments(cu_seqlens: Sequence[int] | torch.Tensor) -> tuple[int, ...]:
    bounds = _integers(cu_seqlens)
    assert bounds is not None
    if len(bounds) < 2 or bounds[0] != 0:
        raise VLBridgeError(
            f"cu_seqlens holds 0 and then the end of each segment in the whole pack, padding included; found {bounds}"
        )
    for segment, (start, end) in enumerate(pairwise(bounds)):
        if end <= start:
            raise VLBridgeError(
                f"cu_seqlens: segment {segment} begins at {start} and ends at {end}; every segment needs a token and "
                "begins where the one before it ends. Leave out repeated entries"
            )
    return tuple(end - start for start, end in pairwise(bounds))


def _true_lengths(lengths: Sequence[int] | torch.Tensor | None, segments: tuple[int, ...]) -> tuple[int, ...]:
    found = _integers(lengths)
    if found is None:
        return segments
    if len(found) != len(segments):
        raise VLBridgeError(f"lengths: expected one for each of the {len(segments)} segments, found {len(found)}")
    for segment, (length, padded) in enumerate(zip(found, segments, strict=True)):
        if not 1 <= length <= padded:
            raise VLBridgeError(
                f"lengths: segment {segment} has {length} tokens without padding; cu_seqlens gives it {padded}, "
                f"so 1 to {padded} are expected"
            )
    return found


def _is_shard(tokens: torch.Tensor, segments: tuple[int, ...], cp_size: int) -> bool:
    if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.dtype != torch.int64:
        raise VLBridgeError(f"tokens of a packed row are int64 [1, T], found {tokens.dtype} {list(tokens.shape)}")
    found, total = tokens.shape[1], sum(segments)
    if found == total:
        return False
    if found * cp_size != total:
        raise VLBridgeError(
            f"the row has {found} tokens, but cu_seqlens ends at {total}: expected {total} (the whole pack) or, under "
            f"context parallelism of size {cp_size}, {total / cp_size:g} (this rank's part). cu_seqlens is that of the "
            "whole pack with its padding; padding behind the last segment is a segment of its own"
        )
    check_divisible(segments, cp_size)
    return True


def _without_padding(row: Row, padding: torch.Tensor, config: Config) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens, a filler where they are `padding` `[T]`, and labels, after checks."""
    refuse_outside_vocabulary("tokens", row.tokens[0], ~padding, config)
    tokens, labels = row.tokens.masked_fill(padding, filler_token(config)), row.labels
    if labels is None:
        return tokens, None
    if labels.shape != tokens.shape or labels.is_floating_point():
        raise VLBridgeError(
            f"labels: expected int64 {list(tokens.shape)} as the tokens, found {labels.dtype} {list(labels.shape)}"
        )
    refuse_outside_vocabulary("labels", labels[0], labels[0] != IGNORED, config)
    bad = (padding & (labels[0] != IGNORED)).nonzero().flatten()
    if len(bad):
        raise VLBridgeError(
            f"labels: {len(bad)} tokens of the padding have a label, the first is {int(labels[0, bad[0]])} at token "
            f"{int(bad[0])} of this rank's row; expected {IGNORED}"
        )
    return tokens, labels


def _refuse_prediction_layers(config: Config) -> None:
    if config.text.num_mtp_layers:
        raise VLBridgeError(
            "multi-token prediction needs the token behind each one, which may lie on another context-parallel rank. "
            "Give every rank the whole row; the model then takes this rank's part"
        )


def _integers(values: Sequence[int] | torch.Tensor | None) -> tuple[int, ...] | None:
    if values is None:
        return None
    if isinstance(values, torch.Tensor):
        if values.dim() != 1 or values.is_floating_point():
            raise VLBridgeError(
                "cu_seqlens, lengths and counts per segment are integers [n], "
                f"found {values.dtype} {list(values.shape)}"
            )
        values = values.tolist()
    return tuple(int(value) for value in values)
