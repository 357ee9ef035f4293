"""Faults on the way from the project's modules to the kernels, each made in a process for the time of one step."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from tests.functional.pool import Layout

Arguments = dict[str, Any]


def run(layout: Layout, mutant: str, **arguments: Any) -> dict[str, Any]:
    """`forward_backward` with this fault, without the check before the first step, which would find some too."""
    from tests.functional.ranks import forward_backward, unguarded

    with MUTANTS[mutant](), unguarded():
        return forward_backward(layout, **arguments)


@contextmanager
def _attention(change: Callable[[Arguments], object]) -> Iterator[None]:
    """A fault in what Transformer Engine's attention module is called with."""
    from transformer_engine.pytorch import DotProductAttention

    original = DotProductAttention.forward
    DotProductAttention.forward = _changed(original, change)
    try:
        yield
    finally:
        DotProductAttention.forward = original


@contextmanager
def _kernel(name: str, change: Callable[[Arguments], object]) -> Iterator[None]:
    """A fault in what a function of the extension is called with."""
    from tests.te.extension import REFERENCES

    original = REFERENCES[name]
    REFERENCES[name] = _changed(original, change)
    try:
        yield
    finally:
        REFERENCES[name] = original


@contextmanager
def _linear_attention(name: str, change: Callable[[Arguments], object]) -> Iterator[None]:
    """A fault in the keywords that Megatron's `GatedDeltaNet` gives a function of flash-linear-attention."""
    from megatron.core.ssm.gated_delta_net import gdn

    original = getattr(gdn, name)

    def call(*args: Any, **keywords: Any) -> Any:
        change(keywords)
        return original(*args, **keywords)

    setattr(gdn, name, call)
    try:
        yield
    finally:
        setattr(gdn, name, original)


def _changed(original: Callable[..., Any], change: Callable[[Arguments], object]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        change(bound.arguments)
        return original(*bound.args, **bound.kwargs)

    return call


def _nothing(arguments: Arguments) -> None: ...


def _max_seqlen(arguments: Arguments) -> None:
    for name in ("max_seqlen_q", "max_seqlen_kv"):
        arguments[name] //= 2


def _int64(arguments: Arguments) -> None:
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        arguments[name] = arguments[name].long()


def _one_segment(arguments: Arguments) -> None:
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        arguments[name] = arguments[name][[0, -1]]
    arguments["max_seqlen_q"] = arguments["max_seqlen_kv"] = len(arguments["query_layer"])


def _one_segment_of_linear_attention(arguments: Arguments) -> None:
    arguments["cu_seqlens"] = arguments["cu_seqlens"][[0, -1]]


def _without_the_last_segment(arguments: Arguments) -> None:
    arguments["cu_seqlens"] = arguments["cu_seqlens"][:-1]


def _other_end(arguments: Arguments) -> None:
    """The last token of each segment as padding."""
    for name in ("cu_seqlens_q", "cu_seqlens_kv"):
        places = arguments[name]
        arguments[name] = places - places.new_tensor(range(len(places)))
    arguments["pad_between_seqs"] = True


def _exchanged_padding(arguments: Arguments) -> None:
    for name in ("cu_seqlens_q", "cu_seqlens_kv"):
        padded = f"{name}_padded"
        arguments[name], arguments[padded] = arguments[padded], arguments[name]


def _causal_tower(arguments: Arguments) -> None:
    if arguments["attn_mask_type"] == "padding":
        arguments["attn_mask_type"] = "padding_causal"


def _bidirectional_text(arguments: Arguments) -> None:
    if arguments["attn_mask_type"] == "padding_causal":
        arguments["attn_mask_type"] = "padding"


def _heads_of_keys(arguments: Arguments) -> None:
    arguments["key_layer"] = arguments["key_layer"].flip(1)


def _one_key_head(arguments: Arguments) -> None:
    for name in ("k", "v"):
        arguments[name] = arguments[name][:, :1]


def _sbhd(arguments: Arguments) -> None:
    arguments["qkv_format"] = "sbhd"


def _enum(name: str, member: str) -> Callable[[Arguments], None]:
    def change(arguments: Arguments) -> None:
        arguments[name] = type(arguments[name])[member]

    return change


def _value(name: str, value: Any) -> Callable[[Arguments], None]:
    def change(arguments: Arguments) -> None:
        arguments[name] = value

    return change


def _scaled(name: str, factor: float) -> Callable[[Arguments], None]:
    def change(arguments: Arguments) -> None:
        arguments[name] *= factor

    return change


def _no_bias(arguments: Arguments) -> None:
    if not arguments["grad"]:
        arguments["bias"] = None


def _no_bias_gradient(arguments: Arguments) -> None:
    if arguments["grad"] and arguments["bias"] is not None:
        arguments["b"] = arguments["b"] * 0.5


def _splits(arguments: Arguments) -> None:
    if arguments["splits"] is not None:
        arguments["splits"] = arguments["splits"][::-1]


def _other_expert(arguments: Arguments) -> None:
    if not arguments["grad"]:
        arguments["a"] = arguments["a"][::-1]


def _first_expert_alone(arguments: Arguments) -> None:
    if not arguments["grad"]:
        arguments["a"] = [arguments["a"][0]] * len(arguments["a"])


MUTANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "none": partial(_attention, _nothing),
    "max_seqlen": partial(_attention, _max_seqlen),
    "cu_seqlens in int64": partial(_attention, _int64),
    "one segment": partial(_attention, _one_segment),
    "a token of each segment is padding": partial(_attention, _other_end),
    "causal tower": partial(_attention, _causal_tower),
    "bidirectional text": partial(_attention, _bidirectional_text),
    "heads of keys in another order": partial(_attention, _heads_of_keys),
    "no segments": partial(_attention, _value("cu_seqlens_q", None)),
    "qkv_format": partial(_attention, _sbhd),
    "padded and unpadded exchanged": partial(_kernel, "fused_attn_fwd", _exchanged_padding),
    "padded and unpadded exchanged backward": partial(_kernel, "fused_attn_bwd", _exchanged_padding),
    "one head of keys": partial(_kernel, "fused_attn_fwd", _one_key_head),
    "scale": partial(_kernel, "fused_attn_fwd", _scaled("scale", 1.01)),
    "scale backward": partial(_kernel, "fused_attn_bwd", _scaled("scale", 1.01)),
    "window": partial(_kernel, "fused_attn_fwd", _value("window", (16, 0))),
    "dropout": partial(_kernel, "fused_attn_fwd", _value("dropout", 0.1)),
    "softmax": partial(_kernel, "fused_attn_fwd", _enum("softmax_type", "NVTE_OFF_BY_ONE_SOFTMAX")),
    "layout": partial(_kernel, "fused_attn_fwd", _enum("qkv_layout", "NVTE_SBHD_SBHD_SBHD")),
    "mask": partial(_kernel, "fused_attn_fwd", _enum("mask_type", "NVTE_CAUSAL_MASK")),
    "eps of the tower": partial(_kernel, "layernorm_fwd", _scaled("eps", 1000)),
    "eps of the language model": partial(_kernel, "rmsnorm_fwd", _scaled("eps", 1000)),
    "zero-centered gamma": partial(_kernel, "rmsnorm_fwd", _value("zero_centered_gamma", True)),
    "missing bias": partial(_kernel, "generic_gemm", _no_bias),
    "gradient of the bias": partial(_kernel, "generic_gemm", _no_bias_gradient),
    "tokens of another expert": partial(_kernel, "te_general_grouped_gemm", _splits),
    "weights of another expert": partial(_kernel, "te_general_grouped_gemm", _other_expert),
    "state across segments": partial(_linear_attention, "chunk_gated_delta_rule", _one_segment_of_linear_attention),
    "convolution across segments": partial(_linear_attention, "causal_conv1d", _one_segment_of_linear_attention),
    "tokens of no segment": partial(_linear_attention, "chunk_gated_delta_rule", _without_the_last_segment),
    "no activation": partial(_linear_attention, "causal_conv1d", _value("activation", None)),
    "norm in the kernel": partial(_linear_attention, "chunk_gated_delta_rule", _value("use_qk_l2norm_in_kernel", True)),
    "one expert for all": partial(_kernel, "te_general_grouped_gemm", _first_expert_alone),
}
