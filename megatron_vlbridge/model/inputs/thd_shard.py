"""One context-parallel rank's view of a packed (THD) batch."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.layout.frames import Frames
from megatron_vlbridge.layout.vision_index import ShardCounts, ShardedPack, ShardPlaces
from megatron_vlbridge.layout.zigzag import check_divisible
from megatron_vlbridge.model.inputs.pack import PackedInputs
from megatron_vlbridge.model.inputs.positions import GivenPositions
from megatron_vlbridge.model.inputs.thd_batch import ThdBatch, integers
from megatron_vlbridge.model.inputs.tokens import IGNORED, check_labels, check_vocabulary, filler_token, placeholders


@dataclass(frozen=True)
class RankStatus:
    """What a rank sends the others: its failure, or checksums of what all ranks must share and its counts."""

    failure: str | None = None
    shared: dict[str, int] = field(default_factory=dict)
    counts: ShardCounts | None = None


@dataclass(frozen=True)
class ThdLayout(BatchLayout):
    """A layout whose segments come with their padding: `padded` are the lengths that the framework gave them."""

    padded: tuple[int, ...] = ()

    @property
    def padded_lengths(self) -> tuple[int, ...]:
        """As the framework gave them, which may be more than context parallelism needs."""
        return self.padded

    @property
    def is_padding(self) -> torch.Tensor:
        """Which of this rank's tokens are padding: bool `[total / cp_size]`."""
        if self.lengths == self.padded:
            return torch.zeros(self.total // self.cp_size, dtype=torch.bool)
        return self.gather_index < 0

    @property
    def gather_index(self) -> torch.Tensor:
        """As of every layout; here segments end with padding without context parallelism too."""
        if self.cp_size > 1:
            return super().gather_index
        lengths, padded = torch.tensor(self.lengths), torch.tensor(self.padded)
        runs = torch.stack((lengths, padded - lengths), dim=1).flatten()
        held = (torch.arange(len(runs)) % 2 == 0).repeat_interleave(runs)
        return torch.where(held, held.cumsum(0) - 1, -1)


class ThdShard:
    """One rank's batch, checked as far as the rank can alone; then `inputs` from the statuses of all ranks.

    Raises VLBridgeError where the batch's own parts do not match.
    """

    def __init__(self, batch: ThdBatch, config: Config, cp_size: int, cp_rank: int) -> None:
        segments = batch.segments()
        lengths = batch.true_lengths(segments)
        self.sharded = _is_shard(batch.tokens, segments, cp_size)
        self._layout = ThdLayout(lengths, sum(segments), cp_size, cp_rank, padded=segments)
        held = self._layout if self.sharded else replace(self._layout, cp_size=1, cp_rank=0)
        self._tokens, self._labels = _without_padding(batch, held.is_padding, config)
        self._positions = batch.positions
        if self._positions is not None:
            self._positions.check(held)
        media = batch.media
        images, videos = media.grids(config)
        self._patches = media.patches(config)
        per_segment = (media.images_per_segment, media.videos_per_segment)
        self._per_segment = tuple(None if counts is None else integers(counts) for counts in per_segment)
        self._kinds = placeholders(self._tokens[0], config)
        self._whole = None
        counts = None
        if self.sharded:
            if config.text.num_mtp_layers:
                raise VLBridgeError(
                    "multi-token prediction needs the token after each one, which may be on another context-parallel "
                    "rank. Give every rank the whole pack; the model then takes this rank's part"
                )
            self._pack = ShardedPack(segments, cp_size, images, videos, config.vision.spatial_merge_size)
            counts = self._pack.count(self._kinds)
        else:
            # Padding stays where it is: it counts as text at its segment's end, only the layout distinguishes it.
            layout = BatchLayout.packed(segments, sum(segments))
            whole = PackedInputs.from_pack(layout, self._tokens, media, config, self._labels)
            whole = whole.with_positions(self._positions, held).context_parallel(cp_size, cp_rank, config)
            self._whole = replace(whole, layout=self._layout)
        shared = {
            "a whole pack or a part of it (T)": self.sharded,
            "cu_seqlens": segments,
            "lengths": lengths,
            "image grids": images,
            "video grids": videos,
            "images_per_segment, videos_per_segment": self._per_segment,
            "labels or none": batch.labels is not None,
            "position_ids (none, their dims, or check_position_ids)": _kind(self._positions),
        }
        checksums = {what: zlib.crc32(repr(value).encode()) for what, value in shared.items()}
        self.status = RankStatus(shared=checksums, counts=counts)

    def inputs(self, statuses: Sequence[RankStatus]) -> PackedInputs:
        """This rank's inputs, from all ranks' statuses (in the order of the ranks).

        Raises VLBridgeError where the ranks' batches do not match; the same on every rank.
        """
        for rank, status in enumerate(statuses):
            for what, checksum in status.shared.items():
                if checksum != statuses[0].shared[what]:
                    raise VLBridgeError(
                        f"context-parallel ranks 0 and {rank} of {len(statuses)} have different batches: they differ "
                        f"in {what}. All ranks must get the same segments and grids, and a part of the same pack"
                    )
        if self._whole is not None:
            return self._whole
        self._pack.check(_counts(statuses), *self._per_segment)
        places = self._places(statuses)
        position_ids = places.position_ids[:, None]
        return PackedInputs(
            layout=self._layout,
            tokens=self._tokens,
            position_ids=position_ids if self._positions is None else self._positions.instead_of(position_ids),
            frames=Frames((*self._pack.image_grids, *self._pack.video_grids), self._pack.merge_size),
            patches=self._patches,
            vision_token_index=places.vision_token_index,
            labels=None if self._labels is None else self._labels.clamp(min=0),
            loss_mask=None if self._labels is None else (self._labels != IGNORED).float(),
            vision_embed_index=places.vision_embed_index,
        )

    @property
    def compares_positions(self) -> bool:
        """Whether the batch's positions are to be compared once `inputs` has passed; the same on every rank."""
        return self.sharded and self._positions is not None and self._positions.compared

    def with_compared_positions(self, statuses: Sequence[RankStatus]) -> Self:
        """The same; VLBridgeError where positions of this rank's part are not the computed ones."""
        assert self._positions is not None
        self._positions.compare(self._places(statuses).position_ids[:, None], self._layout)
        return self

    def _places(self, statuses: Sequence[RankStatus]) -> ShardPlaces:
        return self._pack.places(self._kinds, _counts(statuses), self._layout.cp_rank)


def _counts(statuses: Sequence[RankStatus]) -> list[ShardCounts]:
    return [status.counts for status in statuses if status.counts is not None]


def _kind(positions: GivenPositions | None) -> tuple[int, bool] | None:
    """What all ranks must share of their positions."""
    return None if positions is None else (positions.ids.dim(), positions.compared)


def _is_shard(tokens: torch.Tensor, segments: tuple[int, ...], cp_size: int) -> bool:
    if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.dtype != torch.int64:
        raise VLBridgeError(f"tokens of a packed batch are int64 [1, T], found {tokens.dtype} {list(tokens.shape)}")
    found, total = tokens.shape[1], sum(segments)
    if found == total:
        return False
    if found * cp_size != total:
        raise VLBridgeError(
            f"the packed batch has {found} tokens, but cu_seqlens ends at {total}: expected {total} (the whole pack) "
            f"or, under context parallelism of size {cp_size}, {total / cp_size:g} (this rank's part). cu_seqlens is "
            "that of the whole pack with its padding; padding after the last segment is a segment of its own"
        )
    check_divisible(segments, cp_size)
    return True


def _without_padding(
    batch: ThdBatch, padding: torch.Tensor, config: Config
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens, a filler where they are `padding` `[T]`, and labels, after checks."""
    check_vocabulary("tokens", batch.tokens[0], ~padding, config)
    tokens, labels = batch.tokens.masked_fill(padding, filler_token(config)), batch.labels
    if labels is None:
        return tokens, None
    if labels.shape != tokens.shape or labels.is_floating_point():
        raise VLBridgeError(
            f"labels: expected int64 {list(tokens.shape)} as the tokens, found {labels.dtype} {list(labels.shape)}"
        )
    check_labels(labels[0], padding, "this rank's tokens", config)
    return tokens, labels
