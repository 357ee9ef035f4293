"""Images and videos under `torch.distributed.pipelining`: every micro-batch has the media of its own samples.

`schedule.step` cuts every tensor of its keywords along the first axis, which gives samples the patches of others. What
is not a tensor it hands to each micro-batch whole. So a stage gets the whole batch as such a leaf, beside a tensor of
sample indices, and selects its samples itself. Nothing is kept between calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vlbridge.config import Config
from megatron_vlbridge.data.samples import BATCH_KEYS, check_batch, select_samples
from megatron_vlbridge.errors import VLBridgeError

# Input and target of a schedule, which it cuts correctly by itself.
_TOKENS = ("input_ids", "tokens", "labels", "loss_mask")
# For the selection of samples, and for computing positions, which the batch has.
_NOT_OF_THE_MODEL = ("n_images_per_sample", "n_videos_per_sample", "mm_token_type_ids", "second_per_grid_ts")
# What the layers after the first stage need.
_EVERY_STAGE = ("position_ids", "attention_mask")

# The packages of transformers' models that are verified, with those of their vision and language models.
VERIFIED = (
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe",
    "kimi_k25",
    "deepseek_v3",
    "mistral3",
    "mistral",
    "pixtral",
)
REJECTED = dict.fromkeys(
    ("gemma4", "gemma4_unified"),
    "its layers read per-layer embeddings of the tokens, keys and values of earlier layers, and a mask that depends on "
    "the image tokens, none of which crosses stages",
)


@dataclass(frozen=True, eq=False)
class WholeBatch:
    """A batch that a schedule does not cut, since it is not a tensor."""

    tensors: Mapping[str, Tensor] = field(repr=False)

    def select(self, sample_index: Tensor) -> dict[str, Tensor]:
        """The samples of a micro-batch, each with its own images and videos."""
        return select_samples(self.tensors, sample_index.tolist())


def media_kwargs(
    batch: Mapping[str, Tensor], *, config: Config | None = None, n_microbatches: int | None = None
) -> dict[str, Any]:
    """The keywords of `schedule.step` for a batch of B samples whose stages are each a `MediaStage`.

    The batch has keys of `BATCH_KEYS`; `position_ids` are required, since a stage after the first has no tokens to
    compute them from. Later stages need no pixels: there the keys of images and videos, with their counts, may be left
    out. Raises VLBridgeError: as `check_batch` with this `config` does, without position ids, and if `n_microbatches`
    is given and does not divide B.

    Example: `schedule.step(batch["input_ids"], **media_kwargs(batch))` on the first stage,
    `schedule.step(target=batch["labels"], losses=losses, **media_kwargs(batch))` on the last.
    """
    check_batch(batch, config)
    if "position_ids" not in batch:
        raise VLBridgeError(
            "batch: position_ids: expected them for every stage, found none. transformers would count tokens from zero "
            "in each stage after the first, without an error. Compute them with the model's get_rope_index."
        )
    size = int(batch["position_ids"].shape[-2])
    if n_microbatches is not None and size % n_microbatches:
        raise VLBridgeError(
            f"batch: expected {n_microbatches} micro-batches of the same number of samples, found {size} samples. "
            "A torch schedule needs equal shapes: use another number of micro-batches, or drop the last samples."
        )
    whole = {key: tensor for key, tensor in batch.items() if key not in _TOKENS}
    return {"whole": WholeBatch(whole), "sample_index": torch.arange(size)}


class MediaStage(nn.Module):
    """A stage of a pipeline that calls `module` with the media and positions of the micro-batch's own samples.

    `module` is the part of a model that belongs to this stage. Where its input is token ids (integers), it is called
    with them, grids and pixels (not if they are empty: the vision towers of transformers fail on no image), and
    `position_ids` and `attention_mask`, if the batch has one; where its input is hidden states, with the last two.
    Other keywords are passed on. Instead of `media_kwargs`, the keywords may be a part of `split_global_batch`.

    Raises VLBridgeError: for a model of transformers that is not verified (docs/torch-pipeline.md), and, when called,
    if media or positions are missing or belong to another micro-batch.

    Example: `PipelineStage(MediaStage(module), rank, num_stages, device)`.
    """

    handles_media = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        _check_verified(module)
        self.module = module

    def forward(
        self, *inputs: Tensor, whole: WholeBatch | None = None, sample_index: Tensor | None = None, **keywords: Any
    ) -> Any:
        """The output of the module for this micro-batch."""
        batch = {key: keywords.pop(key) for key in tuple(keywords) if key in BATCH_KEYS}
        if whole is not None and sample_index is not None:
            if batch:
                raise VLBridgeError(
                    f"{self._name}: expected {', '.join(batch)} only in media_kwargs(batch), found also a part that "
                    "the schedule cut. Leave it out of schedule.step."
                )
            batch = whole.select(sample_index)
        if "position_ids" not in batch:
            raise VLBridgeError(
                f"{self._name}: expected the keywords of media_kwargs(batch), or a part of split_global_batch with "
                f"position_ids, found {', '.join(batch) or 'none'}. Pass them to schedule.step on each stage; a "
                "module around this one must pass them on."
            )
        size = batch["position_ids"].shape[-2]
        if len(inputs[0]) != size:
            raise VLBridgeError(
                f"{self._name}: expected {size} samples, those of the media, found an input of {len(inputs[0])}."
            )
        return self.module(*inputs, **_stage_keys(batch, first=not inputs[0].is_floating_point()), **keywords)

    @property
    def _name(self) -> str:
        return f"MediaStage of {type(self.module).__name__}"


def _stage_keys(batch: Mapping[str, Tensor], *, first: bool) -> dict[str, Tensor]:
    if not first:
        return {key: batch[key] for key in _EVERY_STAGE if key in batch}
    return {key: tensor for key, tensor in batch.items() if len(tensor) and key not in (*_TOKENS, *_NOT_OF_THE_MODEL)}


def _check_verified(module: nn.Module) -> None:
    """Reject models of transformers that are not verified; other modules are checked by `check_pipeline_media`."""
    for part in module.modules():
        names = type(part).__module__.split(".")
        if names[:2] != ["transformers", "models"] or names[2] in VERIFIED:
            continue
        reason = REJECTED.get(names[2], "it is not verified in stages")
        raise VLBridgeError(
            f"{type(part).__name__}: {reason}. Verified are the models of these packages of transformers: "
            f"{', '.join(VERIFIED)}."
        )
