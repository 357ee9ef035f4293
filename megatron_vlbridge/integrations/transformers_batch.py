"""Packs as keyword arguments of transformers' models, which keep the segments of a pack apart."""

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.positions import mrope_positions

ATTENTION = ("eager", "sdpa", "flash_attention_2")
# The verified `model_type`s. In the first, a video is one block of tokens, whose time is in `second_per_grid_ts`.
WHOLE_VIDEOS = ("qwen2_5_vl",)
MODELS = (*WHOLE_VIDEOS, "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
# The first version whose linear attention takes segments, and the packages whose kernels do.
LINEAR_VERSION = (5, 23)
LINEAR_PACKAGES = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}

_KEYS = ("tokens", "labels", "segment_lengths", "images_per_segment", "videos_per_segment")
_MEDIA = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
_SECONDS = "second_per_grid_ts"
_IGNORE = -100


def as_transformers_batch(pack: Mapping[str, Tensor], model: Any) -> dict[str, Any]:
    """The keyword arguments with which `model` computes for a pack what it does for each of its samples alone.

    `pack` is that of `data.packing.packs.build_pack`, on the CPU, with T tokens; for videos of Qwen2.5-VL also with
    `second_per_grid_ts` float `[videos]`. `model` is a `...ForConditionalGeneration` of transformers, whose attention
    implementation decides how segments are kept apart. Padding is one more segment. The tensors are on the device of
    the model: `input_ids` and `labels` int64 `[1, T]` (not shifted: transformers does that), `position_ids` int64
    `[4, 1, T]` (token in the segment, time, row, column), pixels and grids of images and videos, if there are any, and

    - `eager`, `sdpa`: `attention_mask` `[1, 1, T, T]`, additive in the dtype of the model, or bool;
    - `flash_attention_2`: `cu_seq_lens_q`, `cu_seq_lens_k` int32 `[n + 1]`, `max_length_q`, `max_length_k`;
    - linear attention, if there is more than one sample, in addition: `cu_seq_lens_q` and `seq_idx` int32 `[1, T]`.

    Raises VLBridgeError: the model, its attention implementation, or a layer is not verified (docs/transformers.md);
    keys of the pack are missing, unknown, or do not belong together.

    Example: `model(**as_transformers_batch(dataset[0], model)).loss.backward()`.
    """
    config = _checked_config(model)
    _check_keys(pack, whole_videos=config.model_type in WHOLE_VIDEOS)
    lengths = _checked_lengths(pack)
    text = config.get_text_config()
    linear = "linear_attention" in (getattr(text, "layer_types", None) or ())
    # State flows only from earlier to later tokens: the padding after a single sample does not matter.
    if len(pack["segment_lengths"]) == 1 and text._attn_implementation != "flash_attention_2":
        linear = False
    if linear:
        _check_linear_attention(type(model).__name__)
    positions = torch.cat((_count(lengths)[None], _mrope(pack, lengths, config)))
    batch = {
        "input_ids": pack["tokens"][None],
        "labels": pack["labels"].roll(1)[None],  # the last one is -100
        "position_ids": positions[:, None],
    }
    for pixels, grids in _MEDIA.items():
        if len(pack[grids]):  # the towers fail on none
            batch |= {pixels: pack[pixels], grids: pack[grids]}
    on_device = {key: tensor.to(model.device) for key, tensor in batch.items()}
    return on_device | _segments(lengths, config, model, linear=linear) | {"use_cache": False}


def _segments(lengths: Tensor, config: Any, model: Any, *, linear: bool) -> dict[str, Any]:
    """The keywords that keep segments of these lengths apart, also in linear attention if it is there."""
    implementation = config.get_text_config()._attn_implementation
    segment = torch.arange(len(lengths)).repeat_interleave(lengths).to(model.device)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(model.device, torch.int32)
    result: dict[str, Any]
    if implementation == "flash_attention_2":
        longest = int(lengths.max())
        result = {"cu_seq_lens_k": bounds, "cu_seq_lens_q": bounds, "max_length_q": longest, "max_length_k": longest}
    else:
        mask = (segment[:, None] == segment[None]).tril_()[None, None]
        if implementation == "eager":  # it adds the mask
            lowest = torch.finfo(model.dtype).min
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, lowest)
        result = {"attention_mask": mask}
    if linear:
        result |= {"cu_seq_lens_q": bounds, "seq_idx": segment[None].to(torch.int32)}
    return result


def _count(lengths: Tensor) -> Tensor:
    """Int64 `[T]`: the index of each token in its segment."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)


def _mrope(pack: Mapping[str, Tensor], lengths: Tensor, config: Any) -> Tensor:
    """Int64 `[3, T]`: time, row and column of each token."""
    merge = config.vision_config.spatial_merge_size
    positions = mrope_positions(
        pack["tokens"],
        pack["segment_lengths"],
        pack["image_grid_thw"],
        pack["video_grid_thw"],
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        merge_size=merge,
        images_per_segment=pack["images_per_segment"],
        videos_per_segment=pack["videos_per_segment"],
    )
    if config.model_type in WHOLE_VIDEOS:
        _join_frames(positions, pack, lengths, config)
    return positions


def _join_frames(positions: Tensor, pack: Mapping[str, Tensor], lengths: Tensor, config: Any) -> None:
    """Make one block of each video, in place: frames differ in time, and text continues after the first frame."""
    merge, ends = config.vision_config.spatial_merge_size, lengths.cumsum(0)
    places = (pack["tokens"] == config.video_token_id).nonzero().flatten()
    intervals = config.vision_config.tokens_per_second * pack.get(_SECONDS, torch.zeros(0))
    for video, (grid, interval) in enumerate(zip(pack["video_grid_thw"], intervals, strict=True)):
        frames, rows, columns = (grid // torch.tensor([1, merge, merge])).tolist()
        own, places = places.tensor_split([frames * rows * columns])
        start, stop = int(own[0]), int(own[-1]) + 1
        if stop - start != len(own):
            raise VLBridgeError(
                f"pack: video {video}: expected its {len(own)} tokens in a row, from token {start}, found other tokens "
                f"between. {config.model_type} has no text between frames: encode with its own processor."
            )
        time = (torch.arange(frames) * interval).long()
        block = torch.meshgrid(time, torch.arange(rows), torch.arange(columns), indexing="ij")
        positions[:, start:stop] = positions[0, start] + torch.stack(block).flatten(1)
        end = int(ends[torch.searchsorted(ends, start, right=True)])
        positions[:, stop:end] -= (frames - 1) * max(rows, columns)


def _check_keys(pack: Mapping[str, Tensor], *, whole_videos: bool) -> None:
    """The keys are those of a pack, and their sizes belong together."""
    expected = {*_KEYS, *_MEDIA, *_MEDIA.values(), *((_SECONDS,) if whole_videos and _SECONDS in pack else ())}
    unknown = pack.keys() - expected - {"replaced_per_source"}
    for word, keys in (("missing", expected - pack.keys()), ("unknown", unknown)):
        if keys:
            raise VLBridgeError(
                f"pack: {word} keys: {', '.join(sorted(keys))}. Expected those of build_pack: "
                f"{', '.join(sorted(expected))}."
            )
    tokens, labels = pack["tokens"], pack["labels"]
    if tokens.dim() != 1 or labels.shape != tokens.shape or tokens.device.type != "cpu":
        raise VLBridgeError(
            f"pack: expected tokens and labels [T] on the CPU, found {list(tokens.shape)} and {list(labels.shape)} on "
            f"{tokens.device}. A DataLoader with batch_size=None gives packs as they are."
        )
    for pixels, grids in _MEDIA.items():
        if len(pack[pixels]) != int(pack[grids].prod(1).sum()):
            raise VLBridgeError(
                f"pack: {pixels}: expected {int(pack[grids].prod(1).sum())} patches, those of {grids}, found "
                f"{len(pack[pixels])}."
            )
    videos, found = len(pack["video_grid_thw"]), len(pack.get(_SECONDS, ()))
    if whole_videos and found != videos:
        raise VLBridgeError(
            f"pack: {_SECONDS}: expected {videos} values, one for each video, found {found}. Add those of the "
            "processor: without them transformers takes one second for each temporal patch."
        )


def _checked_lengths(pack: Mapping[str, Tensor]) -> Tensor:
    """The lengths of the segments, with the padding as the last one, if no label is in another segment."""
    lengths, size = pack["segment_lengths"], len(pack["tokens"])
    padding = size - int(lengths.sum())
    if len(lengths) == 0 or int(lengths.min()) < 1 or padding < 0:
        raise VLBridgeError(
            f"pack: segment_lengths: expected positive lengths with a sum of at most {size}, found {lengths.tolist()}."
        )
    crossing = (pack["labels"][lengths.cumsum(0) - 1] != _IGNORE).nonzero().flatten().tolist()
    where = [f"segment {index}" for index in crossing]
    where += ["padding"] if (pack["labels"][size - padding :] != _IGNORE).any() else []
    if where:
        raise VLBridgeError(
            f"pack: labels: {where[0]}: expected {_IGNORE} where no token of the same segment follows, found another "
            "label. A label is the next token, as next_token_labels gives it."
        )
    return torch.cat((lengths, lengths.new_tensor([padding]))) if padding else lengths


def _checked_config(model: Any) -> Any:
    """The config of the model, if every part that sees other tokens is verified."""
    name, config = type(model).__name__, getattr(model, "config", None)
    found = getattr(config, "model_type", None)
    if config is None or found not in MODELS:
        raise VLBridgeError(
            f"{name}: expected a model of transformers with one of the model_types {', '.join(MODELS)}, found {found}. "
            "Pass the model itself, not a wrapper such as DistributedDataParallel (its .module)."
        )
    text = config.get_text_config()
    for part in (text, config.vision_config):
        if part._attn_implementation not in ATTENTION:
            raise VLBridgeError(
                f"{name}: {part.model_type}: expected an attention implementation of {', '.join(ATTENTION)}, found "
                f"{part._attn_implementation}. Load the model with attn_implementation='sdpa' or another of these."
            )
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise VLBridgeError(
            f"{name}: layer_types: expected full attention, found sliding_attention, which is not verified in packs."
        )
    if getattr(text, "output_router_logits", False):
        raise VLBridgeError(
            f"{name}: output_router_logits: expected False, found True. The router's balancing loss would be that of "
            "the pack with its padding, not of its samples."
        )
    return config


def _check_linear_attention(name: str) -> None:
    """Linear attention carries its state into the next segment, except in kernels that take segments."""
    found = version("transformers")
    if tuple(int(x) for x in found.split(".")[:2]) < LINEAR_VERSION:
        raise VLBridgeError(
            f"{name}: linear attention: expected transformers {'.'.join(map(str, LINEAR_VERSION))} or newer, found "
            f"{found}, whose linear layers take no segments: state would leak from one into the next. Upgrade, or make "
            "packs of one sample."
        )
    missing = [package for module, package in LINEAR_PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise VLBridgeError(
            f"{name}: linear attention: expected the packages {' and '.join(LINEAR_PACKAGES.values())}, did not find "
            f"{' and '.join(missing)}. Without their kernels, which need a GPU, transformers' linear layers let state "
            "leak from one segment into the next. Install them, or make packs of one sample."
        )
