"""A processor that resizes each image and video of a conversation with a size of its own."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from megatron_vlbridge.data.media import Size


def with_sizes(processor: ProcessorMixin, images: Sequence[Size], videos: Sequence[Size]) -> ProcessorMixin:
    """A processor for one conversation that resizes each of its images and videos with its own `size`.

    Example: `with_sizes(processor, [None, {"shortest_edge": 3136, "longest_edge": 50_176}], [])`.
    """
    sizes = {"image_processor": images, "video_processor": videos}
    chosen = {name: _PerItem(getattr(processor, name), own) for name, own in sizes.items() if any(own)}
    if not chosen:
        return processor
    changed = copy.copy(processor)
    for name, part in chosen.items():
        setattr(changed, name, part)
    return changed


class _PerItem:
    """An image or video processor that is called for each item; transformers' take one `size` for all."""

    def __init__(self, processor: Any, sizes: Sequence[Size]) -> None:
        self._processor, self._sizes = processor, sizes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, items: Any = None, *, images: Any = None, videos: Any = None, **settings: Any) -> dict[str, Any]:
        items = next(given for given in (items, images, videos) if given is not None)
        results: list[dict[str, Any]] = []
        for index, (item, size) in enumerate(zip(items, self._sizes, strict=True)):
            own: dict[str, Any] = {"size": size} if size else {}
            if settings.get("video_metadata"):
                own["video_metadata"] = [settings["video_metadata"][index]]
            results.append(self._processor([item], **settings | own))
        joined = {name: [result[name] for result in results] for name in results[0]}
        return {name: _joined(values) for name, values in joined.items()}


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else [entry for value in values for entry in value]
