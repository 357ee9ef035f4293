"""Transformer Engine's names of dtypes."""

import torch


def to_torch(te_dtype: object) -> torch.dtype:
    """The dtype that the extension's `DType` stands for."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[te_dtype]
