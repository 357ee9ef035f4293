"""Learning rates of the parts of a model, as parameter groups of Megatron's optimizer. For Megatron-Core 0.19."""

from collections.abc import Sequence
from functools import partial

import torch
from megatron.core.optimizer import OptimizerConfig, ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_vlbridge.model.parts import LR_MULTIPLIER


def lr_overrides(config: OptimizerConfig, chunks: Sequence[torch.nn.Module]) -> dict[ParamKey, ParamGroupOverride]:
    """What `set_lr_multipliers` set in this rank's chunks of the model, for Megatron's `get_megatron_optimizer`.

    Example: `get_megatron_optimizer(config, chunks, get_standard_config_overrides(config) | lr_overrides(config,
    chunks))`.
    """
    multipliers = {_multiplier(parameter) for chunk in chunks for parameter in chunk.parameters()} - {1.0}
    return {
        ParamKey(predicate=ParamPredicate(f"{LR_MULTIPLIER} {value}", partial(_is_multiplied, value=value))): (
            ParamGroupOverride(max_lr=config.lr * value, min_lr=config.min_lr * value)
        )
        for value in sorted(multipliers)
    }


def _multiplier(parameter: torch.nn.Parameter) -> float:
    return float(getattr(parameter, LR_MULTIPLIER, 1.0))


def _is_multiplied(parameter: torch.nn.Parameter, value: float) -> bool:
    return _multiplier(parameter) == value
