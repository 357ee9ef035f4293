"""What runs in the process that asks for Transformer Engine's choice of attention: with a user's guards."""

import dataclasses
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch


def choose(capability: tuple[int, int], parameters: dict[str, Any]) -> str:
    """The attention for these fields of `AttentionParams`; `flash`: flash-attention is installed."""
    from packaging.version import Version
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    import tests.te.as_gpu  # noqa: F401

    flash = parameters.pop("flash", False)
    utils.FlashAttentionUtils.is_installed, utils.FlashAttentionUtils.version = flash, Version("2.8.3")
    pack = utils.AttentionParams(
        qkv_layout="thd_thd_thd", window_size=(-1, -1), core_attention_bias_requires_grad=False
    )
    asked = dataclasses.replace(pack, **parameters)
    with mock.patch.object(utils, "get_device_compute_capability", return_value=capability):
        chosen = utils.get_attention_backend(asked)
    return next((name for name, i in (("flash", 0), ("fused", 2), ("unfused", 4)) if chosen[i]), "none")


def called(folder: Path, chosen: str, store: Path, variables: dict[str, str] | None = None) -> set[str]:
    """What a forward and backward of the model in bf16 calls of the extension."""
    from megatron.core.transformer.enums import AttnBackend

    import tests.te.as_gpu  # noqa: F401
    from tests import reference
    from tests.functional import matrix
    from tests.functional.parity import PACK_LENGTH
    from tests.gpu.model import backward, build, one_process
    from tests.te.extension import CALLS

    kept = dict(os.environ)
    os.environ.update(variables or {})
    CALLS.clear()
    try:
        with one_process("nccl", store):
            model = build(folder, torch.bfloat16, attention_backend=AttnBackend[chosen])
            backward(model, reference.pack(matrix.groups()[0], PACK_LENGTH))
        return set(CALLS)
    finally:
        # Megatron writes the choice there.
        os.environ.clear()
        os.environ.update(kept)
