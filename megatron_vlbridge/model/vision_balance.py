"""The vision tower's work shared out over the context-parallel ranks, frame by frame."""

from itertools import accumulate

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch.nn.functional import pad

from megatron_vlbridge.layout.balance import frame_work, share_out
from megatron_vlbridge.layout.frames import Frames
from megatron_vlbridge.layout.zigzag import ramps
from megatron_vlbridge.model.vision import VisionModel


def balanced_features(
    tower: VisionModel, patches: torch.Tensor, frames: Frames, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """What `tower(patches, frames)` gives, each rank of `group` having run its share of the frames.

    All ranks come in with the whole batch and go out with all features `[levels, N, H]`. In the backward pass each
    rank gets, for its own frames, the sum of all ranks' gradients. A rank without a frame runs a blank one, since the
    tower's own collectives and gradients wait for it too.
    """
    sizes = frames.lengths
    shares = share_out([frame_work(size, tower.vision.hidden_size) for size in sizes], group.size())
    mine = shares[group.rank()]
    area, side = tower.vision.merge_area, tower.vision.spatial_merge_size
    if mine:
        pieces = patches.split(list(sizes))
        singles = frames.singles
        own = Frames(tuple(singles[number] for number in mine), frames.merge_size)
        features = tower(torch.cat([pieces[number] for number in mine]), own)
    else:
        features = tower(patches.new_zeros(area, patches.shape[1]), Frames(((1, side, side),), side))
    longest = max(1, *(sum(sizes[number] for number in share) // area for share in shares))
    rows = pad(features.transpose(0, 1), (0, 0, 0, 0, 0, longest - features.shape[1])).contiguous()
    gathered = gather_from_sequence_parallel_region(rows, group=group)
    return gathered[_order(sizes, shares, area, longest, gathered.device)].transpose(0, 1)


def _order(
    sizes: tuple[int, ...], shares: tuple[tuple[int, ...], ...], area: int, longest: int, device: torch.device
) -> torch.Tensor:
    """Where the tokens of each frame, in the batch's order, stand in the ranks' gathered rows: int64 `[N]`."""
    tokens = [size // area for size in sizes]
    firsts: dict[int, int] = {}
    for rank, share in enumerate(shares):
        before = accumulate((tokens[number] for number in share), initial=0)
        firsts |= {number: rank * longest + start for number, start in zip(share, before, strict=False)}
    runs = torch.tensor([[firsts[number], count] for number, count in enumerate(tokens)])
    starts, counts = runs.to(device, non_blocking=True).T
    return ramps(starts, counts, total=sum(tokens))
