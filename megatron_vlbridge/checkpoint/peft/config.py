"""`adapter_config.json` of a LoRA adapter: rank and scaling of each module, and what is not supported."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlbridge.checkpoint.stream.json_file import load_json_object
from megatron_vlbridge.errors import VLBridgeError

CONFIG = "adapter_config.json"
# Keys that only name things, initialize a training or limit where adapters are created.
_FREE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern", "target_parameters",
    "use_rslora",
}  # fmt: skip
# The ways to initialize an adapter that leave the base as it is (peft 0.21); others, such as PiSSA, change it, so that
# the adapter does not belong to the published weights.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterConfig:
    """Ranks and alphas of an adapter; their patterns are matched with `key_of` a weight, as by `peft`.

    `parameters` are its `target_parameters`, which `peft` merges in other steps than modules; they need not be whole
    names.
    """

    rank: int
    alpha: float
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    parameters: tuple[str, ...] = field(default=(), compare=False)

    def key_of(self, weight: str) -> str:
        """The name that patterns are matched with: the parameter's if it is adapted itself, or its module's."""
        return weight if self.is_parameter(weight) else weight.removesuffix(".weight")

    def rank_of(self, key: str) -> int:
        """The rank of what has this key, such as `model.language_model.layers.0.self_attn.q_proj`."""
        return self.ranks.get(_match(self.ranks, key), self.rank)

    def is_parameter(self, weight: str) -> bool:
        """Whether a weight is one of `parameters`."""
        return any(f".{weight}".endswith(f".{name}") for name in self.parameters)

    def scaling_of(self, key: str) -> float:
        """What B @ A is multiplied by: alpha / r, with rslora alpha / sqrt(r) (peft 0.21, `LoraLayer.update_layer`)."""
        rank, alpha = self.rank_of(key), self.alphas.get(_match(self.alphas, key), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The config of a PEFT folder.

    Raises VLBridgeError, naming file and key, for another method than LoRA and for a key with a value that changes the
    result and is not supported (DoRA, biases, `modules_to_save`, `fan_in_fan_out` and any unknown key).
    Example: `read_adapter_config(Path("adapter")).rank_of("lm_head")`.
    """
    if not folder.is_dir():
        raise VLBridgeError(f"{folder}: expected a local folder of peft, found none. Download the adapter first.")
    path = folder / CONFIG
    values = load_json_object(path)
    if values.get("peft_type") != "LORA":
        raise _error(path, "peft_type", "LORA", values.get("peft_type"))
    for key in values.keys() - _FREE - _READ:
        if values[key] not in (None, False, "none", [], {}):
            raise _error(path, key, "no value (it would change the weights)", values[key])
    start = values.get("init_lora_weights")
    if not isinstance(start, str | bool | None) or start not in _STARTS:
        raise _error(path, "init_lora_weights", "an adapter of the unchanged base", start)
    numbers = {"r": values.get("r"), **_pattern(path, values, "rank_pattern")}
    for key, value in numbers.items():
        if type(value) is not int or value < 1:
            raise _error(path, key, "a positive integer", value)
    alphas = {"lora_alpha": values.get("lora_alpha"), **_pattern(path, values, "alpha_pattern")}
    for key, value in alphas.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise _error(path, key, "a finite number", value)
    rslora = values.get("use_rslora", False)
    if type(rslora) is not bool:
        raise _error(path, "use_rslora", "true or false", rslora)
    parameters = values.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise _error(path, "target_parameters", "a list of names", parameters)
    return AdapterConfig(numbers.pop("r"), alphas.pop("lora_alpha"), rslora, numbers, alphas, tuple(parameters))


def _pattern(path: Path, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    pattern = values.get(key) or {}
    if not isinstance(pattern, dict):
        raise _error(path, key, "an object", pattern)
    for name in pattern:
        try:
            re.compile(name)
        except re.error as error:
            raise _error(path, key, "regular expressions", name) from error
    return pattern


def _match(patterns: Mapping[str, object], key: str) -> str:
    """The first pattern that a key ends in, as `peft.utils.get_pattern_key` chooses it."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", key)), key)


def _error(path: Path, key: str, expected: str, found: object) -> VLBridgeError:
    return VLBridgeError(
        f"{path}: {key}: expected {expected}, found {found!r:.80}. Merge this adapter with peft, or train one without."
    )
