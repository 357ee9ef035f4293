"""The one form of a batch inside the model: a pack."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.batch_layout import BatchLayout, gather, select
from megatron_vlbridge.layout.frames import Frames
from megatron_vlbridge.layout.positions import mrope_positions
from megatron_vlbridge.model.inputs.digest import PackDigest
from megatron_vlbridge.model.inputs.media import Media
from megatron_vlbridge.model.inputs.mtp import MtpInputs
from megatron_vlbridge.model.inputs.positions import GivenPositions
from megatron_vlbridge.model.inputs.tokens import IGNORED, check_labels, check_vocabulary, filler_token, placeholders


@dataclass(frozen=True)
class SequenceShard:
    """The image tokens in a tensor-parallel rank's part of the sequence.

    `embed_index` `[n]`: which of the pack's image tokens they are; `token_index` `[n]`: their place in the part.
    """

    embed_index: torch.Tensor
    token_index: torch.Tensor


@dataclass(frozen=True)
class PackedInputs:
    """One pack, ready for a pipeline stage. Every tensor that has an axis of tokens follows `layout`.

    `tokens` `[1, T]`, `position_ids` `[3, 1, T]` (time, row, column), `patches` `[P, patch_dim]` of images then videos
    (none on stages without the tower), `vision_token_index` `[N]`: the place in the pack of each token that the tower
    makes, in the tower's order; `labels` `[1, T]` and `loss_mask` `[1, T]` only where a loss is wanted, with
    `loss_weights` `[1, T]` where the losses of its tokens are to be multiplied. Under context
    parallelism T counts this rank's tokens, and `vision_embed_index` `[N]` says which of the tower's outputs belong to
    its `vision_token_index` (None: all, in order). Under sequence parallelism `shard` says which of them lie in this
    tensor-parallel rank's part. `mtp` is what an MTP layer needs, where the checkpoint has one. `digest` is that of the
    whole pack where a data loader gave it.

    Example: `inputs = PackedInputs.from_padded(batch["input_ids"], batch["attention_mask"], media, config)`.
    """

    layout: BatchLayout
    tokens: torch.Tensor
    position_ids: torch.Tensor
    frames: Frames
    patches: torch.Tensor
    vision_token_index: torch.Tensor
    labels: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    loss_weights: torch.Tensor | None = None
    vision_embed_index: torch.Tensor | None = None
    shard: SequenceShard | None = None
    mtp: MtpInputs | None = None
    digest: PackDigest | None = None

    @classmethod
    def from_pack(
        cls,
        layout: BatchLayout,
        tokens: torch.Tensor,
        media: Media,
        config: Config,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
    ) -> Self:
        """From tokens `[1, T]` on the host (and `labels`, -100 where there is no loss) that already follow `layout`.

        Raises VLBridgeError where tokens, layout, grids, counts and patches do not match.
        """
        if tokens.shape != (1, layout.total):
            raise VLBridgeError(f"tokens of a pack are [1, {layout.total}], found {list(tokens.shape)}")
        check_vocabulary("tokens", tokens[0], torch.ones_like(tokens[0], dtype=torch.bool), config)
        if labels is not None:
            check_labels(labels[0], torch.arange(layout.total) >= sum(layout.lengths), "the pack", config)
        images, videos = media.grids(config)
        patches = media.patches(config)
        position_ids = mrope_positions(
            tokens[0],
            layout.lengths,
            torch.tensor(images, dtype=torch.int64).view(-1, 3),
            torch.tensor(videos, dtype=torch.int64).view(-1, 3),
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            merge_size=config.vision.spatial_merge_size,
            images_per_segment=media.images_per_segment,
            videos_per_segment=media.videos_per_segment,
        )
        mtp = None
        if config.text.num_mtp_layers:
            mtp = MtpInputs.from_pack(tokens, labels, layout.lengths, filler_token(config), IGNORED, loss_weights)
        return cls(
            layout=layout,
            tokens=tokens,
            position_ids=position_ids[:, None],
            frames=Frames(images + videos, config.vision.spatial_merge_size),
            patches=patches,
            # Sorted by kind, then by place.
            vision_token_index=placeholders(tokens[0], config).nonzero()[:, 1],
            labels=None if labels is None else labels.clamp(min=0),
            loss_mask=None if labels is None else (labels != IGNORED).float(),
            loss_weights=loss_weights,
            mtp=mtp,
        )

    @classmethod
    def from_padded(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        media: Media,
        config: Config,
        labels: torch.Tensor | None = None,
        multiple_of: int = 1,
    ) -> Self:
        """From a padded `[B, S]` batch as transformers takes it; `labels` are next tokens, -100 where no loss.

        `multiple_of`: the tensor-parallel size under sequence parallelism, else 1.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        layout = BatchLayout.from_padded(mask, multiple_of)
        packed_labels = None if labels is None else layout.pack(labels, IGNORED)
        return cls.from_pack(layout, layout.pack(input_ids, filler_token(config)), media, config, packed_labels)

    def with_positions(self, given: GivenPositions | None, layout: BatchLayout | None = None) -> Self:
        """The same whole pack with the positions that came with it, if any; `layout`: one that knows more padding.

        Raises VLBridgeError where they cannot be taken: see :class:`GivenPositions`.
        """
        if given is None:
            return self
        layout = layout or self.layout
        given.check(layout)
        given.compare(self.position_ids, layout)
        return replace(self, position_ids=given.instead_of(self.position_ids))

    def context_parallel(self, cp_size: int, cp_rank: int, config: Config) -> Self:
        """This context-parallel rank's part of a whole pack: every tensor gathered with the layout's one index."""
        if cp_size == 1:
            return self
        layout = self.layout.context_parallel(cp_size, cp_rank)
        index, filler = layout.gather_index, filler_token(config)
        token_index, embed_index = select(self.vision_token_index, index, layout.total)
        return replace(
            self,
            layout=layout,
            tokens=gather(self.tokens, index, filler),
            position_ids=gather(self.position_ids, index, 0),
            vision_token_index=token_index,
            vision_embed_index=embed_index,
            labels=None if self.labels is None else gather(self.labels, index, 0),
            loss_mask=None if self.loss_mask is None else gather(self.loss_mask, index, 0),
            loss_weights=None if self.loss_weights is None else gather(self.loss_weights, index, 0),
            mtp=self.mtp and self.mtp.gather(index, filler),
        )

    def with_sequence_shard(self, size: int, rank: int) -> Self:
        """The same whole pack, knowing which image tokens are in the part of tensor-parallel rank `rank` of `size`."""
        if self.shard is not None:
            return self
        tokens = self.tokens.shape[1] // size
        index = self.vision_token_index - rank * tokens
        mine = ((index >= 0) & (index < tokens)).nonzero().flatten()
        return replace(self, shard=SequenceShard(mine, index[mine]))

    @property
    def deepstack_token_index(self) -> torch.Tensor:
        """Which of this rank's hidden states are image tokens."""
        return self.vision_token_index if self.shard is None else self.shard.token_index

    def padding_mask(self, tp_size: int, tp_rank: int) -> torch.Tensor:
        """Which of this rank's tokens are padding: bool `[1, s]`, under sequence parallelism of its part."""
        return self._of_rank(self.layout.gather_index < 0, tp_size, tp_rank)[None]

    def segment_index(self, tp_size: int, tp_rank: int) -> torch.Tensor:
        """The segment that each of this rank's tokens is of: int64 `[s]`, 0 for padding, of the same part."""
        ends = torch.tensor(self.layout.lengths).cumsum(0)
        index = torch.searchsorted(ends, self.layout.gather_index.clamp(min=0), right=True)
        return self._of_rank(index, tp_size, tp_rank)

    def _of_rank(self, row: torch.Tensor, tp_size: int, tp_rank: int) -> torch.Tensor:
        part = row if self.shard is None else row.chunk(tp_size)[tp_rank]
        return part.to(self.tokens.device, non_blocking=True)

    def to(self, device: torch.device) -> Self:
        """The same pack with its tensors on `device`."""
        return replace(
            self,
            **_moved(self, device),
            shard=self.shard and replace(self.shard, **_moved(self.shard, device)),
            mtp=self.mtp and replace(self.mtp, **_moved(self.mtp, device)),
        )


def _moved(tensors: object, device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True)
        for name, value in vars(tensors).items()
        if isinstance(value, torch.Tensor)
    }
