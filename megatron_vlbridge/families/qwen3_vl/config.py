"""The `config.json` of dense Qwen3-VL; defaults of transformers 5.23 (`configuration_qwen3_vl.py`)."""

from typing import Any

from megatron_vlbridge.config import ConfigFormat

# What Qwen3-VL-MoE has in common.
TEXT: dict[str, Any] = {
    "vocab_size": 151936,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
    "mrope_section": [24, 20, 20],
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "mtp_num_hidden_layers": 0,
}
VISION: dict[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "initializer_range": 0.02,
    "deepstack_visual_indexes": [8, 16, 24],
}
TOKENS = (151655, 151656, 151652, 151653)

CONFIG = ConfigFormat(
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    text=TEXT
    | {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    vision=VISION,
    tokens=TOKENS,
    in_transformers_4=True,
)
