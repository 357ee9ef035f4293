"""The door of the model: whatever form a batch comes in, it becomes one pack."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.layout.frames import Frames, grids_of
from megatron_vlbridge.layout.positions import mrope_positions
from megatron_vlbridge.model.mtp_inputs import MtpInputs

IGNORED = -100
Grids = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Media:
    """Patches of a batch's images and videos (fp32 `[P, patch_dim]`) and their grids (`[n, 3]`, on the host).

    How many images and videos each segment has is checked against the tokens where it is given. Pipeline stages without
    the tower need no patches (`patches_wanted` False): these may be None, and are else only checked for their shape.
    """

    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    pixel_values_videos: torch.Tensor | None = None
    video_grid_thw: torch.Tensor | None = None
    images_per_segment: torch.Tensor | None = None
    videos_per_segment: torch.Tensor | None = None
    patches_wanted: bool = True


@dataclass(frozen=True)
class SequencePart:
    """A tensor-parallel rank's part of the picture tokens: which of them, and their rows in its part of the tokens."""

    features: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class PackedInputs:
    """One pack, ready for a pipeline stage. Every tensor that has an axis of tokens follows `layout`.

    `tokens` `[1, T]`, `position_ids` `[3, 1, T]` (time, row, column), `patches` `[P, patch_dim]` of images then videos
    (no rows on stages without the tower), `vision_rows` `[N]`: the place in the pack of each token that the tower
    makes, in the tower's order; `labels` `[1, T]` and `loss_mask` `[1, T]` only where a loss is wanted. Under context
    parallelism T counts this rank's tokens, and `feature_rows` `[N]` says which of the tower's rows belong to its
    `vision_rows` (None: all, in order).
    Under sequence parallelism `part` says which of these lie in this tensor-parallel rank's part. `mtp` is what a
    prediction layer needs, where the checkpoint has one.

    Example:
        >>> inputs = PackedInputs.from_padded(batch["input_ids"], batch["attention_mask"], media, config)
    """

    layout: BatchLayout
    tokens: torch.Tensor
    position_ids: torch.Tensor
    frames: Frames
    patches: torch.Tensor
    vision_rows: torch.Tensor
    labels: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    feature_rows: torch.Tensor | None = None
    part: SequencePart | None = None
    mtp: MtpInputs | None = None

    @classmethod
    def from_pack(
        cls,
        layout: BatchLayout,
        tokens: torch.Tensor,
        media: Media,
        config: Config,
        labels: torch.Tensor | None = None,
    ) -> "PackedInputs":
        """From tokens `[1, T]` on the host (and `labels`, -100 where there is no loss) that already follow `layout`.

        Raises:
            VLBridgeError: where tokens, layout, grids, counts and patches do not fit each other.
        """
        if tokens.shape != (1, layout.total):
            raise VLBridgeError(f"tokens of a pack are [1, {layout.total}], found {list(tokens.shape)}")
        refuse_outside_vocabulary("tokens", tokens[0], torch.ones_like(tokens[0], dtype=torch.bool), config)
        if labels is not None:
            refuse_outside_vocabulary("labels", labels[0], labels[0] != IGNORED, config)
            _refuse_labels_in_padding(labels[0], layout)
        images, videos, patches = grids_and_patches(media, config)
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
        places = [(tokens[0] == i).nonzero().flatten() for i in (config.image_token_id, config.video_token_id)]
        return cls(
            layout=layout,
            tokens=tokens,
            position_ids=position_ids[:, None],
            frames=Frames(images + videos, config.vision.spatial_merge_size),
            patches=patches,
            vision_rows=torch.cat(places),
            labels=None if labels is None else labels.clamp(min=0),
            loss_mask=None if labels is None else (labels != IGNORED).float(),
            mtp=MtpInputs.from_pack(tokens, labels, layout.lengths, filler_token(config), IGNORED)
            if config.text.num_mtp_layers
            else None,
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
    ) -> "PackedInputs":
        """From a padded `[B, S]` batch as transformers takes it; `labels` are next tokens, -100 where no loss.

        `multiple_of`: the tensor-parallel size under sequence parallelism, else 1.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        layout = BatchLayout.from_padded(mask, multiple_of)
        packed_labels = None if labels is None else layout.pack(labels, IGNORED)
        return cls.from_pack(layout, layout.pack(input_ids, filler_token(config)), media, config, packed_labels)

    def context_parallel(self, cp_size: int, cp_rank: int, config: Config) -> "PackedInputs":
        """This context-parallel rank's part of a whole pack: every tensor taken with the layout's one index."""
        if cp_size == 1:
            return self
        layout = self.layout.context_parallel(cp_size, cp_rank)
        sources = layout.sources
        vision_rows, feature_rows = taken_rows(self.vision_rows, sources, layout.total)
        return replace(
            self,
            layout=layout,
            tokens=take(self.tokens, sources, filler_token(config)),
            position_ids=take(self.position_ids, sources, 0),
            vision_rows=vision_rows,
            feature_rows=feature_rows,
            labels=None if self.labels is None else take(self.labels, sources, 0),
            loss_mask=None if self.loss_mask is None else take(self.loss_mask, sources, 0),
            mtp=self.mtp
            and replace(
                self.mtp,
                tokens=take(self.mtp.tokens, sources, filler_token(config)),
                labels=None if self.mtp.labels is None else take(self.mtp.labels, sources, 0),
                weights=None if self.mtp.weights is None else take(self.mtp.weights, sources, 0),
            ),
        )

    def sequence_parallel(self, size: int, rank: int) -> "PackedInputs":
        """The same pack, knowing which picture tokens lie in the part of tensor-parallel rank `rank` of `size`."""
        tokens = self.tokens.shape[1] // size
        rows = self.vision_rows - rank * tokens
        mine = ((rows >= 0) & (rows < tokens)).nonzero().flatten()
        return replace(self, part=SequencePart(mine, rows[mine]))

    @property
    def deepstack_rows(self) -> torch.Tensor:
        """The rows of this rank's hidden states that hold picture tokens."""
        return self.vision_rows if self.part is None else self.part.rows

    def to(self, device: torch.device) -> "PackedInputs":
        """The same pack with its tensors on `device`."""
        return replace(
            self,
            **_moved(self, device),
            part=self.part and replace(self.part, **_moved(self.part, device)),
            mtp=self.mtp and replace(self.mtp, **_moved(self.mtp, device)),
        )


def _moved(tensors: object, device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True)
        for name, value in vars(tensors).items()
        if isinstance(value, torch.Tensor)
    }


def take(row: torch.Tensor, sources: torch.Tensor, fill: float) -> torch.Tensor:
    """`row` `[..., T]` at `sources`, with `fill` where a source is -1."""
    taken = row[..., sources.clamp(min=0)]
    return taken.masked_fill(sources < 0, fill)


def taken_rows(rows: torch.Tensor, sources: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the places `rows` `[n]` of a pack of `total` tokens stand in `sources`, and which of the n they are."""
    numbers = torch.full((total,), -1)
    numbers[rows] = torch.arange(len(rows))
    mine = take(numbers, sources, -1)
    places = (mine >= 0).nonzero().flatten()
    return places, mine[places]


def filler_token(config: Config) -> int:
    """A token id for padding that is no placeholder."""
    return next(i for i in range(3) if i not in (config.image_token_id, config.video_token_id))


def refuse_outside_vocabulary(what: str, ids: torch.Tensor, used: torch.Tensor, config: Config) -> None:
    """A tensor-parallel embedding or loss would take such an id for zeros, without a word."""
    bad = (used & ((ids < 0) | (ids >= config.text.vocab_size))).nonzero().flatten()
    if len(bad):
        raise VLBridgeError(
            f"{what}: {len(bad)} ids lie outside the vocabulary of {config.text.vocab_size}, "
            f"the first is {int(ids[bad[0]])} at token {int(bad[0])} of the pack"
        )


def _refuse_labels_in_padding(labels: torch.Tensor, layout: BatchLayout) -> None:
    end = sum(layout.lengths)
    bad = (labels[end:] != IGNORED).nonzero().flatten()
    if len(bad):
        raise VLBridgeError(
            f"labels: {len(bad)} tokens of the padding (from token {end} of the pack) have a label, "
            f"the first is {int(labels[end + bad[0]])} at token {end + int(bad[0])}; expected {IGNORED}"
        )


def grids_and_patches(media: Media, config: Config) -> tuple[Grids, Grids, torch.Tensor]:
    """Grids of images and of videos on the host, and the patches of both (fp32); refused where they do not fit."""
    images = _grids_of_kind("image", media.image_grid_thw)
    videos = _grids_of_kind("video", media.video_grid_thw)
    parts = []
    for kind, grids, patches in (("image", images, media.pixel_values), ("video", videos, media.pixel_values_videos)):
        if patches is not None or media.patches_wanted:
            patches = torch.empty(0, config.vision.patch_dim) if patches is None else patches
            _refuse_other_patches(kind, grids, patches, config)
            parts.append(patches)
    if media.patches_wanted:
        return images, videos, torch.cat([patches.float() for patches in parts])
    return images, videos, torch.empty(0, config.vision.patch_dim)


def _grids_of_kind(kind: str, grid_thw: torch.Tensor | None) -> Grids:
    if grid_thw is not None and (grid_thw.shape[1:] != (3,) or grid_thw.is_floating_point()):
        raise VLBridgeError(
            f"{kind} grids are int64 [n, 3] (frames, height, width in patches), "
            f"found {grid_thw.dtype} {list(grid_thw.shape)}"
        )
    return () if grid_thw is None else grids_of(grid_thw)


def _refuse_other_patches(kind: str, grids: Grids, patches: torch.Tensor, config: Config) -> None:
    expected = sum(t * h * w for t, h, w in grids)
    if patches.shape != (expected, config.vision.patch_dim):
        raise VLBridgeError(
            f"{kind} patches: the {len(grids)} grids {list(grids)} stand for {expected} patches of "
            f"{config.vision.patch_dim} values, found a tensor of shape {list(patches.shape)}"
        )
