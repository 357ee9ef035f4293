"""What packs hold, counted on the host as they are read."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Self

import torch

from megatron_vlbridge.config import Config
from megatron_vlbridge.config.flops import forward_flops
from megatron_vlbridge.model.inputs.tokens import IGNORED


@dataclass(frozen=True)
class PackCounts:
    """What a pack holds, or several together.

    `length` counts the tokens with padding, `tokens` those of conversations. `patches` are those of the vision tower
    before they are merged. `token_pairs` are the pairs (query, key) of causal attention in the conversations,
    `patch_pairs` those of full attention in the frames.

    Example: `PackCounts.of(batch) + PackCounts.of(other)`.
    """

    packs: int = 0
    length: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    images: int = 0
    videos: int = 0
    patches: int = 0
    token_pairs: int = 0
    patch_pairs: int = 0

    @classmethod
    def of(cls, batch: Mapping[str, torch.Tensor]) -> Self:
        """Those of a pack as a data loader gives it, every tensor with a leading dimension of 1, on the host."""
        lengths = batch["segment_lengths"][0].to(torch.int64)
        grids = torch.cat((batch["image_grid_thw"][0], batch["video_grid_thw"][0])).to(torch.int64)
        frames, sizes = grids[:, 0], grids[:, 1] * grids[:, 2]
        return cls(
            packs=1,
            length=batch["tokens"].shape[1],
            tokens=int(lengths.sum()),
            supervised_tokens=int((batch["labels"] != IGNORED).sum()),
            images=batch["image_grid_thw"].shape[1],
            videos=batch["video_grid_thw"].shape[1],
            patches=int((frames * sizes).sum()),
            token_pairs=int((lengths * (lengths + 1) // 2).sum()),
            patch_pairs=int((frames * sizes**2).sum()),
        )

    def __add__(self, other: Self) -> Self:
        return type(self)(*(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True)))

    @property
    def padding_share(self) -> float:
        """The share of padding in the length, 0 to 1."""
        return 1 - self.tokens / self.length if self.length else 0.0

    def training_flops(self, config: Config) -> int:
        """Forward and backward, which takes two products for each of the forward; as if no part were frozen.

        Example: `PackCounts.of(batch).training_flops(read_config(folder))`.
        """
        return 3 * self.forward_flops(config)

    def forward_flops(self, config: Config) -> int:
        """The matrix products of a forward pass: see `config.flops`."""
        each = forward_flops(config)
        language = each.token * self.tokens + each.token_pair * self.token_pairs
        return language + each.patch * self.patches + each.patch_pair * self.patch_pairs

    def sum_over_ranks(self) -> Self:
        """The sum of what all ranks have: one all-reduce, which every rank must enter."""
        total = torch.tensor(astuple(self), dtype=torch.int64, device=torch.cuda.current_device())
        torch.distributed.all_reduce(total)
        return type(self)(*total.tolist())
