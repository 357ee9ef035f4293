"""The vision tower's frames partitioned over the context-parallel ranks."""

from itertools import accumulate

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch.nn.functional import pad

from megatron_vlbridge.layout.balance import frame_work, partition
from megatron_vlbridge.layout.frames import Frames
from megatron_vlbridge.layout.zigzag import concat_aranges
from megatron_vlbridge.model.inputs import PackedInputs
from megatron_vlbridge.model.vision.tower import VisionModel


def tower_features(
    tower: VisionModel, inputs: PackedInputs, group: torch.distributed.ProcessGroup, balance: bool
) -> torch.Tensor:
    """The features `[levels, N, 1, H]` of this rank's image tokens, in the order of `vision_token_index`."""
    if balance and group.size() > 1:
        features = balanced_features(tower, inputs.patches, inputs.frames, group)
    else:
        features = tower(inputs.patches, inputs.frames)
    features = features[:, :, None]
    return features if inputs.vision_embed_index is None else features[:, inputs.vision_embed_index]


def balanced_features(
    tower: VisionModel, patches: torch.Tensor, frames: Frames, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """The result of `tower(patches, frames)`, for which each rank of `group` runs its share of the frames.

    All ranks pass the whole batch and get all features `[levels, N, H]`. In the backward pass each rank gets, for its
    own frames, the sum of all ranks' gradients. A rank without a frame runs a dummy one, since the tower's own
    collectives and gradients wait for it too.
    """
    sizes = frames.lengths
    shares = partition([frame_work(size, tower.vision.hidden_size) for size in sizes], group.size())
    mine = shares[group.rank()]
    area = tower.vision.merge_area
    if mine:
        pieces, grids = patches.split(list(sizes)), frames.split_frames
        own = Frames(tuple(grids[frame] for frame in mine), frames.merge_size)
        features = tower(torch.cat([pieces[frame] for frame in mine]), own)
    else:
        features = tower(*tower.dummy_batch(patches.device))
    longest = max(1, *(sum(sizes[frame] for frame in share) // area for share in shares))
    padded = pad(features.transpose(0, 1), (0, 0, 0, 0, 0, longest - features.shape[1])).contiguous()
    gathered = gather_from_sequence_parallel_region(padded, group=group)
    return gathered[_order(sizes, shares, area, longest, gathered.device)].transpose(0, 1)


def _order(
    sizes: tuple[int, ...], shares: tuple[tuple[int, ...], ...], area: int, longest: int, device: torch.device
) -> torch.Tensor:
    """Where the tokens of each frame, in the batch's order, are in the gathered features: int64 `[N]`."""
    tokens = [size // area for size in sizes]
    firsts: dict[int, int] = {}
    for rank, share in enumerate(shares):
        before = accumulate((tokens[frame] for frame in share), initial=0)
        firsts |= {frame: rank * longest + start for frame, start in zip(share, before, strict=False)}
    ranges = torch.tensor([[firsts[frame], count] for frame, count in enumerate(tokens)])
    starts, counts = ranges.to(device, non_blocking=True).T
    return concat_aranges(starts, counts, total=sum(tokens))
