"""Context-parallel ranks run frames of about the same work, and all of them get the features of all frames."""

from types import SimpleNamespace
from typing import Any

import torch

from tests.functional.pool import Layout, Pool

# One large image, then a video of six small frames: see tests/unit/test_balance.py.
GRIDS = ((1, 8, 8), (6, 4, 6))
HIDDEN = 8


class Tower:
    """Gives the mean of each merge block, twice (two levels), and keeps the frames that it ran."""

    vision = SimpleNamespace(hidden_size=HIDDEN, merge_area=4, spatial_merge_size=2)

    def __call__(self, patches: torch.Tensor, frames: Any) -> torch.Tensor:
        """`[N, d]` -> `[2, N / 4, d]`."""
        self.frames = frames.grids
        merged = patches.view(-1, 4, patches.shape[1]).mean(1)
        return torch.stack((merged, 2 * merged))


def run_tower(layout: Layout, patches: torch.Tensor) -> dict[str, Any]:
    """The frames that this rank runs, all features, and the gradient of the patches from this rank's sum."""
    from megatron.core import parallel_state

    from megatron_vlbridge.layout.frames import Frames
    from megatron_vlbridge.model.vision.balance import balanced_features

    tower: Any = Tower()
    patches.requires_grad_()
    group = parallel_state.get_context_parallel_group()
    features = balanced_features(tower, patches, Frames(GRIDS), group)
    features[0].sum().backward()
    return {"frames": tower.frames, "features": features.detach(), "gradient": patches.grad}


def test_frames_are_shared_out_by_their_work(pool: Pool) -> None:
    patches = torch.randn(sum(t * h * w for t, h, w in GRIDS), 3, generator=torch.Generator().manual_seed(0))
    results = pool.run(run_tower, Layout(cp=2, world=2), patches=patches)
    runs = sorted((result["frames"] for result in results), key=len)
    assert runs == [((1, 8, 8), (1, 4, 6)), ((1, 4, 6),) * 5]
    merged = patches.view(-1, 4, 3).mean(1)
    for result in results:
        assert torch.equal(result["features"], torch.stack((merged, 2 * merged)))
    # Each rank has the sum of both ranks' gradients for the frames that it ran, and none for the others.
    total = sum(result["gradient"] for result in results)
    assert torch.equal(total, torch.full_like(total, 2 / 4))
