"""The parts of a model that are frozen, or trained with a learning rate of their own, by name."""

import math
from collections.abc import Collection, Iterator, Mapping

import torch

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.vlm import Qwen3VLModel

PARTS = ("vision", "merger", "language", "router", "embedding")
"""`vision`: the tower without its mergers. `merger`: its merger and the deepstack mergers. `router`: the routers of the
experts, that of the MTP layer too. `embedding`: the word embedding with all its copies; if it is tied, it is the head.
`language`: everything else, that is the decoder layers with a shared expert and its gate, the final norm, the MTP layer
and a head that is not tied."""

# The attribute of a parameter that `set_lr_multipliers` sets.
LR_MULTIPLIER = "lr_multiplier"


def parts_of(hf_config: Config) -> tuple[str, ...]:
    """The parts that the model of a checkpoint has; a model without experts has no router."""
    return tuple(part for part in PARTS if part != "router" or hf_config.text.num_experts)


def part_of(name: str, *, tied: bool) -> str:
    """The part of the parameter with this name in :class:`Qwen3VLModel`; `tied`: the head is the embedding.

    Example: `part_of("vision_model.merger.norm.weight", tied=False)` is `"merger"`.
    """
    if name.startswith("vision_model."):
        return (
            "merger" if name.startswith(("vision_model.merger.", "vision_model.deepstack_merger_list.")) else "vision"
        )
    if name.startswith("language_model.embedding.") or (tied and name.startswith("language_model.output_layer.")):
        return "embedding"
    return "router" if ".mlp.router." in name else "language"


def freeze(model: Qwen3VLModel, parts: Collection[str]) -> None:
    """Freeze these :data:`PARTS` of a stage of the model, which must not be wrapped by Megatron's DDP yet.

    Frozen parameters have no gradient buffer and no optimizer state. Other parts are left as they are.

    Raises VLBridgeError: the model has no part of this name, or nothing else to train.
    Example: `freeze(model, ["vision", "merger"])`, in a `model_provider`.
    """
    check_parts(model.hf_config, parts)
    if set(parts) >= set(parts_of(model.hf_config)):
        raise VLBridgeError(f"{', '.join(parts_of(model.hf_config))} are frozen: no parameter is left to train")
    for part, parameter in _parameters(model):
        if part in parts:
            parameter.requires_grad_(False)


def set_lr_multipliers(model: Qwen3VLModel, multipliers: Mapping[str, float]) -> None:
    """Train these :data:`PARTS` of a stage of the model with multiples of the learning rate.

    `training.pretrain.run` passes them to Megatron's optimizer; a script that creates the optimizer itself passes it
    `training.learning_rates.lr_overrides`.

    Raises VLBridgeError: the model has no part of this name, or a multiplier is not a positive number.
    Example: `set_lr_multipliers(model, {"vision": 0.1})`, in a `model_provider`.
    """
    check_parts(model.hf_config, multipliers)
    for part, multiplier in multipliers.items():
        check_multiplier(part, multiplier)
    for part, parameter in _parameters(model):
        if part in multipliers:
            setattr(parameter, LR_MULTIPLIER, float(multipliers[part]))


def check_parts(hf_config: Config, parts: Collection[str]) -> None:
    """Reject names of parts that the model of the checkpoint does not have."""
    known = parts_of(hf_config)
    if unknown := sorted(set(parts) - set(known)):
        raise VLBridgeError(
            f"{hf_config.architecture} has no part {', '.join(unknown)}, expected some of {', '.join(known)}"
        )


def check_multiplier(part: str, multiplier: float) -> None:
    """Reject a learning-rate multiplier that is not a positive number."""
    if not 0 < multiplier < math.inf:
        raise VLBridgeError(
            f"the learning-rate multiplier of {part} is {multiplier}, expected a positive number; to keep its weights "
            "as they are, freeze it"
        )


def _parameters(model: Qwen3VLModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    tied = model.share_embeddings_and_output_weights
    for name, parameter in model.named_parameters():
        yield part_of(name, tied=tied), parameter
