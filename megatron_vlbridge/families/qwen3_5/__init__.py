"""Dense Qwen3.5 (0.8B to 27B), and the releases with its classes (3.6, 3.8).

Defaults are those of transformers 5.23 (`configuration_qwen3_5.py`).
"""

from dataclasses import replace
from typing import Any

from megatron_vlbridge.config import ConfigFormat
from megatron_vlbridge.families import qwen3_vl
from megatron_vlbridge.families.qwen3_vl.config import VISION as QWEN3_VL_VISION

# Defaults shared with Qwen3.5-MoE. Every fourth layer has full attention, gated and with partial RoPE; the others have
# linear attention.
TEXT: dict[str, Any] = {
    "vocab_size": 248320,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "mrope_section": [11, 11, 10],
    "partial_rotary_factor": 0.25,
    "attn_output_gate": True,
    "num_attention_heads": 16,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "mtp_num_hidden_layers": 0,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
VISION = {key: value for key, value in QWEN3_VL_VISION.items() if key != "deepstack_visual_indexes"}
# Image, video, start and end of vision.
TOKENS = (248056, 248057, 248053, 248054)

CONFIG = ConfigFormat(
    model_type="qwen3_5",
    architecture="Qwen3_5ForConditionalGeneration",
    text=TEXT | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_key_value_heads": 4},
    vision=VISION,
    tokens=TOKENS,
)

FAMILY = replace(qwen3_vl.FAMILY, config=CONFIG)
