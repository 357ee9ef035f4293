"""Padded batches of samples with images and videos, and parts of them: each sample keeps its own media.

The tensors of a batch are cut along different axes: tokens by samples, patches by the grids of a sample's images and
videos. What cuts all of them along the first axis, as `torch.distributed.pipelining` does, gives samples the patches of
others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError


@dataclass(frozen=True)
class BatchKey:
    """A tensor of a batch: its dims (`|`: or), whose parts lie along which of its axes, and whether it holds floats."""

    dims: str
    owner: str
    axis: int = 0
    floats: bool = False


BATCH_KEYS = {
    **dict.fromkeys(
        ("input_ids", "tokens", "labels", "loss_mask", "attention_mask", "mm_token_type_ids"), BatchKey("B S", "sample")
    ),
    "position_ids": BatchKey("3 B S | B S", "sample", axis=1),
    "n_images_per_sample": BatchKey("B", "sample"),
    "n_videos_per_sample": BatchKey("B", "sample"),
    "image_grid_thw": BatchKey("images 3", "image"),
    "grid_thws": BatchKey("images 3", "image"),
    "image_sizes": BatchKey("images 2", "image"),
    "pixel_values": BatchKey("patches D | patches C H W", "image patch", floats=True),
    "video_grid_thw": BatchKey("videos 3", "video"),
    "pixel_values_videos": BatchKey("patches D | patches C H W", "video patch", floats=True),
    "second_per_grid_ts": BatchKey("videos", "video", floats=True),
}
"""The keys of a batch of B samples of S tokens, in the names of transformers and Megatron.

`grid_thws` is Kimi's name of `image_grid_thw`. Beside `image_sizes` (height and width in pixels, Mistral3) a "patch"
is a whole image, padded to the largest. `n_images_per_sample` and `n_videos_per_sample` have an entry for every sample,
zero included. Masks may hold floats, and so may `position_ids`, where a model counts in time.
"""


@dataclass(frozen=True)
class _Media:
    """The keys of images or videos: how many, their grids (under one of these names), patches, placeholder token."""

    kind: str
    count: str
    grids: tuple[str, ...]
    pixels: str
    token: str


_MEDIA = (
    _Media(
        "image", "n_images_per_sample", ("image_grid_thw", "grid_thws", "image_sizes"), "pixel_values", "image_token_id"
    ),
    _Media("video", "n_videos_per_sample", ("video_grid_thw",), "pixel_values_videos", "video_token_id"),
)


def check_batch(batch: Mapping[str, Tensor], config: Config | None = None) -> None:
    """Reject a batch whose tensors do not belong together; with a `config`, also its placeholder tokens.

    Raises VLBridgeError, with the key, sample, and numbers: for keys that are not in `BATCH_KEYS`, other dims or dtypes
    than there, sizes that disagree, counts that are missing or not those of the grids, and samples whose placeholders
    are not those of their images and videos.

    Example: `check_batch({"input_ids": torch.zeros(2, 5, dtype=torch.int64)})`.
    """
    size = _size(batch)
    for media in _MEDIA:
        bounds = _bounds(batch, media, size)
        if config is not None:
            _check_placeholders(batch, bounds, media, config)


def select_samples(batch: Mapping[str, Tensor], indices: Sequence[int]) -> dict[str, Tensor]:
    """The samples of a batch with these indices, in this order, with their images and videos.

    A tensor of media that none of them has stays, with a size of zero. Raises VLBridgeError as `check_batch` does, and
    for an index that is not below B.

    Example: `select_samples(batch, [2, 0])["input_ids"]` is `batch["input_ids"][[2, 0]]`.
    """
    size = _size(batch)
    wrong = [index for index in indices if not 0 <= index < size]
    if wrong:
        raise VLBridgeError(f"batch: expected indices of its {size} samples, found {wrong[0]}.")
    chosen = torch.tensor(indices, dtype=torch.int64)
    index: dict[str, Tensor] = {"sample": chosen}
    for media in _MEDIA:
        items, patches = _bounds(batch, media, size)
        index[media.kind] = _ranges(items[chosen], items[chosen + 1])
        index[f"{media.kind} patch"] = _ranges(patches[items[chosen]], patches[items[chosen + 1]])
    return _take(batch, index)


def split_global_batch(batch: Mapping[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    """The batch as `n` batches, in order; the first `B % n` of them have one sample more.

    They are views. Raises VLBridgeError as `check_batch` does, and where there are fewer samples than batches.

    Example: `split_global_batch(batch, 4)` of five samples has 2, 1, 1 and 1 of them.
    """
    size = _size(batch)
    if not 1 <= n <= size:
        raise VLBridgeError(
            f"batch: expected at least as many samples as parts, found {size} samples for {n} parts. "
            "Use fewer micro-batches or a larger batch."
        )
    samples = [size // n + (part < size % n) for part in range(n)]
    ends = torch.tensor([0, *accumulate(samples)])
    sizes = {"sample": samples}
    for media in _MEDIA:
        items, patches = _bounds(batch, media, size)
        sizes[media.kind] = items[ends].diff().tolist()
        sizes[f"{media.kind} patch"] = patches[items[ends]].diff().tolist()
    parts = {key: x.split(sizes[BATCH_KEYS[key].owner], _axis(key, x)) for key, x in batch.items()}
    return [{key: x[part] for key, x in parts.items()} for part in range(n)]


def _take(batch: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor's parts of these samples, images, videos and patches."""
    result = {}
    for key, tensor in batch.items():
        place = index[BATCH_KEYS[key].owner]
        result[key] = tensor[:, place] if _axis(key, tensor) else tensor[place]
    return result


def _axis(key: str, tensor: Tensor) -> int:
    return 0 if tensor.dim() == 2 else BATCH_KEYS[key].axis


def _ranges(first: Tensor, last: Tensor) -> Tensor:
    """`[first[0], ..., last[0] - 1, first[1], ...]`."""
    return torch.cat([torch.arange(start, stop) for start, stop in zip(first.tolist(), last.tolist(), strict=True)])


def _size(batch: Mapping[str, Tensor]) -> int:
    """B, after a check of every key by itself, and of the sizes that tensors of tokens have in common."""
    sizes: dict[str, tuple[int, ...]] = {}
    for key, tensor in batch.items():
        _check_key(key, tensor)
        if BATCH_KEYS[key].owner == "sample":
            sizes[key] = tuple(tensor.shape[_axis(key, tensor) :])
    if not sizes:
        found = ", ".join(batch) or "no key"
        raise VLBridgeError(f"batch: expected input_ids or another tensor of samples, found {found}.")
    longest = max(sizes, key=lambda key: len(sizes[key]))
    for key, size in sizes.items():
        if size != sizes[longest][: len(size)]:
            raise VLBridgeError(
                f"batch: {key}: expected the sizes of {longest}, {list(sizes[longest])}, found {list(size)}."
            )
    return sizes[longest][0]


def _check_key(key: str, tensor: Tensor) -> None:
    if key not in BATCH_KEYS:
        raise VLBridgeError(f"batch: expected only keys of {', '.join(BATCH_KEYS)}, found {key}. Leave it out.")
    expected = BATCH_KEYS[key]
    forms = [form.split() for form in expected.dims.split(" | ")]
    if not any(_fits(tensor, dims) for dims in forms):
        names = " or ".join(f"[{', '.join(dims)}]" for dims in forms)
        raise VLBridgeError(f"batch: {key}: expected {names}, found {list(tensor.shape)}.")
    if tensor.is_floating_point() != expected.floats and key not in ("loss_mask", "attention_mask", "position_ids"):
        dtype = "floats" if expected.floats else "integers"
        raise VLBridgeError(f"batch: {key}: expected {dtype}, found {tensor.dtype}.")


def _fits(tensor: Tensor, dims: Sequence[str]) -> bool:
    sizes = zip(dims, tensor.shape, strict=False)
    return tensor.dim() == len(dims) and all(not dim.isdigit() or size == int(dim) for dim, size in sizes)


def _bounds(batch: Mapping[str, Tensor], media: _Media, size: int) -> tuple[Tensor, Tensor]:
    """How many images or videos lie before each sample `[B + 1]`, and how many patches before each of them."""
    kind, count, pixels = media.kind, media.count, media.pixels
    named = [key for key in media.grids if key in batch]
    present = [key for key in (*named, pixels) if key in batch]
    if len(named) > 1:
        raise VLBridgeError(f"batch: expected one of {' and '.join(named)}, found both.")
    if present and (len(present) < 2 or count not in batch):
        missing = [key for key in (count, named[0] if named else media.grids[0], pixels) if key not in batch]
        raise VLBridgeError(
            f"batch: {present[0]}: expected {' and '.join(missing)} beside it, found none. Without, it is not known "
            f"which {kind}s are a sample's."
        )
    counts = batch.get(count, torch.zeros(size, dtype=torch.int64)).cpu()
    grids = batch[named[0]].cpu() if named else torch.zeros(0, 3, dtype=torch.int64)
    if bool((counts < 0).any()) or int(counts.sum()) != len(grids):
        raise VLBridgeError(
            f"batch: {count}: expected counts >= 0 of {len(grids)} {kind}s, found {counts.tolist()}, which sum to "
            f"{int(counts.sum())}."
        )
    wrong = (grids < 1).any(1).nonzero().flatten()
    if len(wrong):
        item = int(wrong[0])
        raise VLBridgeError(f"batch: {named[0]}: expected sizes >= 1, found {grids[item].tolist()} of {kind} {item}.")
    whole_images = named == ["image_sizes"]
    patches = _cumulative(torch.ones(len(grids), dtype=torch.int64) if whole_images else grids.prod(1))
    found = len(batch[pixels]) if pixels in batch else 0
    if int(patches[-1]) != found:
        raise VLBridgeError(
            f"batch: {pixels}: expected {int(patches[-1])} patches, those of {len(grids)} grids, found {found}."
        )
    return _cumulative(counts), patches


def _check_placeholders(
    batch: Mapping[str, Tensor], bounds: tuple[Tensor, Tensor], media: _Media, config: Config
) -> None:
    """Each sample holds the placeholders of its own images or videos."""
    tokens = batch.get("input_ids", batch.get("tokens"))
    if tokens is None:
        return
    items, patches = bounds
    found = (tokens == getattr(config, media.token)).sum(1).cpu()
    expected = (patches[items[1:]] - patches[items[:-1]]) // config.vision.merge_area
    for sample in (found != expected).nonzero().flatten().tolist():
        raise VLBridgeError(
            f"batch: sample {sample}: expected {int(expected[sample])} {media.kind} tokens, those of its "
            f"{int(items[sample + 1] - items[sample])} {media.kind}s, found {int(found[sample])}."
        )


def _cumulative(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
