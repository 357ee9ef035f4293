"""What a checkpoint is: frozen dataclasses read from the raw `config.json` in every published form.

Transformers 4.57 wrote `rope_theta` beside `rope_scaling` and `torch_dtype` or `dtype`; 5.x writes `rope_parameters`,
another model type of the vision tower, and `num_local_experts` for the number of experts. Both give the same `Config`.
The keys of a model type and their defaults are data that a family gives (`ConfigFormat`). A value that this project
does not compute exactly is refused.
"""

from megatron_vlbridge.config.reader import read_config_file
from megatron_vlbridge.config.schema import (
    WEIGHT_DTYPES,
    Config,
    ConfigFormat,
    LayerKind,
    LinearAttentionConfig,
    MoeConfig,
    TextConfig,
    VisionConfig,
)

__all__ = [
    "WEIGHT_DTYPES",
    "Config",
    "ConfigFormat",
    "LayerKind",
    "LinearAttentionConfig",
    "MoeConfig",
    "TextConfig",
    "VisionConfig",
    "read_config_file",
]
