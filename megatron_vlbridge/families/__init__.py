"""The model families, one folder each, as data: nothing outside this package names one of them."""

from pathlib import Path

from megatron_vlbridge.config import Config, read_config_file
from megatron_vlbridge.families import cosmos3_omni, qwen3_5, qwen3_5_moe, qwen3_vl, qwen3_vl_moe
from megatron_vlbridge.families.experts import ExpertForm
from megatron_vlbridge.families.family import Family

FAMILIES = (qwen3_vl.FAMILY, qwen3_vl_moe.FAMILY, qwen3_5.FAMILY, qwen3_5_moe.FAMILY, cosmos3_omni.FAMILY)

_TEXT_ONLY = (
    "This is the language model alone, without a vision tower (no vision_config; names model.layers.*): only "
    "vision-language checkpoints are supported."
)
_QWEN4 = (
    "Qwen3.8-Flash-Next has layers that are not supported: hyper-connections, n-gram embeddings per layer, sparse "
    "attention with an indexer, and an MTP layer of another form."
)
UNSUPPORTED = {
    **dict.fromkeys(("Qwen3_5ForCausalLM", "qwen3_5_text", "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"), _TEXT_ONLY),
    **dict.fromkeys(("Qwen4ExpForConditionalGeneration", "qwen4_exp", "Qwen4ExpForCausalLM", "qwen4_exp_text"), _QWEN4),
}
"""Architectures and model types near the supported ones -> why they are not."""

__all__ = ["FAMILIES", "ExpertForm", "Family", "find", "read_config"]


def read_config(path: str | Path) -> Config:
    """Read a Hugging Face `config.json` into a `Config`.

    `path` is a checkpoint folder or the file itself. Nothing but that file is read and no transformers class is asked,
    so the installed version of transformers has no part in the answer.

    Raises VLBridgeError, with file, key, value, what was expected and a remedy, for a missing or malformed file, an
    architecture that is not known, a value that matters and is not supported, and values that contradict each other.
    Example: `read_config("Qwen3-VL-2B-Instruct").text.num_layers` is 28.
    """
    return read_config_file(path, [family.config for family in FAMILIES], UNSUPPORTED)


def find(config: Config) -> Family:
    """The family that a config belongs to.

    Example: `find(read_config(folder)).table(config)` is the rule table of the checkpoint in `folder`.
    """
    return next(family for family in FAMILIES if family.architecture == config.architecture)
