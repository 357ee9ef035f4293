"""Which weights published FP8 checkpoints quantise: the linear layers of decoder and MTP layers, experts one by one.

Embeddings, head, norms, routers, the gate of a shared expert, `mtp.fc`, convolutions, the small projections `a` and `b`
of linear attention and the vision tower are not quantised (Qwen3-VL-FP8, Qwen3.5-FP8 and Qwen3.6-FP8 on the Hub).
"""

import re
from collections.abc import Iterable

_QUANTISED = re.compile(
    r"(?:model\.language_model|mtp)\.layers\.\d+\.(?:self_attn|linear_attn|mlp)\.(?:.+\.)?"
    r"(?:(?:q|k|v|o|gate|up|down|out)_proj|in_proj_(?:qkv|z))\.weight"
)
# Engines that join modules look for the joined name.
_JOINED = ((".attn.qkv", ".attn.qkv_proj"), (".in_proj_b", ".in_proj_ba"))
_ENGINE_PREFIX = "model.visual.", "visual."


def is_quantised(name: str) -> bool:
    """Whether FP8 checkpoints have this weight in 8 bits; experts have tensors of their own there.

    Example: `is_quantised("mtp.layers.0.mlp.experts.3.up_proj.weight")`, but not `"mtp.layers.0.mlp.gate.weight"`.
    """
    return _QUANTISED.fullmatch(name) is not None


def unquantised_modules(weights: Iterable[str]) -> list[str]:
    """The modules of these weights, as `modules_to_not_convert` of `quantization_config` lists them.

    Those of the vision tower and joined ones also have the names that vLLM and sglang give them.
    """
    names = dict.fromkeys(name.removesuffix(".weight") for name in weights)
    own, engine = _ENGINE_PREFIX
    for name in list(names):
        joined = next((name.removesuffix(a) + b for a, b in _JOINED if name.endswith(a)), name)
        names[joined] = names[engine + joined.removeprefix(own) if joined.startswith(own) else joined] = None
    return list(names)
