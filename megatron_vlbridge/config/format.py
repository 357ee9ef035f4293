"""What the `config.json` of one model type holds, as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ConfigFormat:
    """The `config.json` of one model type.

    `text` and `vision` hold, for each key of `text_config` and `vision_config` that the reader looks for, what
    transformers 5.23 takes where it is absent. A key that is not here is one that the model type does not have: with
    `num_experts` it has experts, with `full_attention_interval` linear attention, and so on. `tokens` are the defaults
    of the tokens image, video, vision start and vision end. `parts` is the model type whose text and vision configs it
    has, where that is another.
    """

    model_type: str
    architecture: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tokens: tuple[int, int, int, int]
    parts: str = ""
