"""What transformers 4.57 reads otherwise in a `config.json` than 5.x, and a `config.json` that both read alike.

4.57 takes the tie flag from `text_config` where 5.x takes the top level, knows `rope_theta` and `rope_scaling` but not
`rope_parameters`, and `num_experts` but not `num_local_experts`; its default base is 5e6 where that of 5.x is 5e5.
Sources: `configuration_qwen3_vl.py`, `configuration_qwen3_vl_moe.py` and `PreTrainedModel.tie_weights` of 4.57.6.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_vlbridge.config import Config

_DEFAULT_THETA = 5_000_000.0
_DEFAULT_SECTION = [24, 20, 20]
_DEFAULT_EXPERTS = 60


def differences_in_4(raw: Mapping[str, Any], config: Config) -> Iterator[str]:
    """In words, each value of a `config.json` that transformers 4.57 reads otherwise than it is meant.

    `raw` is the JSON, `config` what it means.
    """
    text = raw["text_config"]
    rope = text.get("rope_scaling")
    section = (rope or {}).get("mrope_section", _DEFAULT_SECTION)
    read: dict[str, tuple[object, object]] = {
        "tie_word_embeddings": (text.get("tie_word_embeddings", False), config.tie_word_embeddings),
        "rope_theta": (text.get("rope_theta", _DEFAULT_THETA), config.text.rope_theta),
        "rope_scaling.mrope_section": (section if rope else None, list(config.text.mrope_section)),
    }
    if config.text.num_experts:
        read["num_experts"] = (text.get("num_experts", _DEFAULT_EXPERTS), config.text.num_experts)
    for name, (found, meant) in read.items():
        if found != meant:
            yield f"text_config.{name} {json.dumps(found)} instead of {json.dumps(meant)}"


def make_portable(raw: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The `config.json` with what 4.57 reads beside what 5.x reads; nothing is taken away."""
    text = dict(raw["text_config"])
    rope = {"rope_type": "default", "mrope_section": list(config.text.mrope_section), "mrope_interleaved": True}
    text |= {
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.text.rope_theta,
        "rope_scaling": {**(text.get("rope_scaling") or {}), **rope},
    }
    if config.text.num_experts:
        text["num_experts"] = config.text.num_experts
    return {**raw, "text_config": text, "tie_word_embeddings": config.tie_word_embeddings}
