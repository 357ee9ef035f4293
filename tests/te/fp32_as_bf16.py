"""Importing this lets attention in fp32, in which results are compared, take the way of attention in bf16."""

from tests.te import runtime

runtime.enable()
runtime.admit_fp32_to_fused_attention()
