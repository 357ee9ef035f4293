"""What Transformer Engine asks of its libraries."""

from typing import Any


def get_cudnn_version() -> int:
    """CuDNN 9.20 as cuDNN encodes it; asked where attention is chosen and for the layout of its softmax statistics."""
    return 92000


def get_cublasLt_version() -> int:
    """CuBLASLt 13.1 as cuBLASLt encodes it; asked by `FP8GlobalStateManager` (quantization.py)."""
    return 130100


def get_num_cublas_streams() -> int:
    """On how many streams grouped products run; `get_cublas_workspace` makes as many workspaces."""
    return 4


def get_fused_attn_backend(parameters: Any) -> tuple[Any, str]:
    """The backend for attention of these parameters, and why there is none; here cuDNN takes everything.

    Called by `get_attention_backend` (attention/dot_product_attention/utils.py) after its own conditions are met.
    """
    import transformer_engine_torch as tex

    return tex.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""
