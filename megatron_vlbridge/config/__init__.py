"""What a checkpoint is: frozen dataclasses read from the raw `config.json` in every published spelling.

Transformers 4.57 wrote `rope_theta` beside `rope_scaling` and `torch_dtype` or `dtype`; 5.x writes `rope_parameters`,
calls the vision tower's model type `qwen3_vl_vision` and the number of experts `num_local_experts`. Both give the same
`Config`. A key that is absent has the default of transformers 5.23. A value that this project does not compute exactly
is refused.
"""

from megatron_vlbridge.config.reader import read_config
from megatron_vlbridge.config.schema import Config, LinearAttentionConfig, MoeConfig, TextConfig, VisionConfig

__all__ = ["Config", "LinearAttentionConfig", "MoeConfig", "TextConfig", "VisionConfig", "read_config"]
