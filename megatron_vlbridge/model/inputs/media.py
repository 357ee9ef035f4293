"""Images and videos of a batch."""

from dataclasses import dataclass

import torch

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.frames import Grid, check_grids, grids_of


@dataclass(frozen=True)
class Media:
    """Patches of a batch's images and videos (fp32 `[P, patch_dim]`) and their grids (`[n, 3]`, on the host).

    How many images and videos each segment has is checked against the tokens where it is given. Pipeline stages without
    the tower need no patches (`patches_wanted` False): there may be none, and else only their shape is checked.
    """

    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    pixel_values_videos: torch.Tensor | None = None
    video_grid_thw: torch.Tensor | None = None
    images_per_segment: torch.Tensor | None = None
    videos_per_segment: torch.Tensor | None = None
    patches_wanted: bool = True

    def grids(self, config: Config) -> tuple[tuple[Grid, ...], tuple[Grid, ...]]:
        """The grids of the images and of the videos, as host integers (VLBridgeError where one is invalid)."""
        images, videos = (
            () if grids is None else grids_of(check_grids(kind, grids, config.vision.spatial_merge_size))
            for kind, grids in (("image", self.image_grid_thw), ("video", self.video_grid_thw))
        )
        return images, videos

    def patches(self, config: Config) -> torch.Tensor:
        """Patches of the images, then of the videos: fp32 `[P, patch_dim]`, `[0, patch_dim]` where not wanted.

        Raises VLBridgeError where their number or size does not match the grids.
        """
        empty = torch.empty(0, config.vision.patch_dim)
        found = []
        pixels = (self.pixel_values, self.pixel_values_videos)
        for kind, grids, patches in zip(("image", "video"), self.grids(config), pixels, strict=True):
            if (patches is None or not len(patches)) and not self.patches_wanted:
                continue
            patches = empty if patches is None else patches
            expected = sum(t * h * w for t, h, w in grids)
            if patches.shape != (expected, config.vision.patch_dim):
                raise VLBridgeError(
                    f"{kind} patches: the {len(grids)} grids {list(grids)} stand for {expected} patches of "
                    f"{config.vision.patch_dim} values, found a tensor of shape {list(patches.shape)}"
                )
            found.append(patches.float())
        return torch.cat(found) if self.patches_wanted else empty
