"""The MTP layer (multi-token prediction), which predicts the token after the next one, as Qwen3.5 names it: `mtp.*`.

It is one decoder layer of the family, with experts where the family has experts. Its input is `fc` of the normed
embedding of the next token, then the normed hidden states after the decoder's last norm; its output is normed and goes
through the model's own head. Megatron stores it as layer `0`, never stacked.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import Copy, Rule

HF_LAYERS = "mtp.layers"
MEGATRON = "language_model.mtp."
_BLOCK = f"{MEGATRON}layers.0"


def check_mtp_tensors(config: Config, names: Iterable[str], source: str, random_mtp: bool = False) -> None:
    """Reject a checkpoint without a tensor of the MTP layer that its config has, or, for a random start, with one.

    Raises VLBridgeError.
    """
    layers, found = config.text.num_mtp_layers, any(name.startswith("mtp.") for name in names)
    if random_mtp and (found or not layers):
        expected = "no such tensors" if found else "text_config.mtp_num_hidden_layers 1 in config.json"
        raise VLBridgeError(
            f"{source}: mtp.*: expected {expected} for a random start of the MTP layer, found "
            f"{'some' if found else layers}. Leave out --random-mtp (random_mtp=True){'' if found else ', or set it'}."
        )
    if layers and not found and not random_mtp:
        raise VLBridgeError(
            f"{source}: mtp.*: expected the tensors of the MTP layer, as text_config.mtp_num_hidden_layers in "
            "config.json is 1, found none. transformers leaves them out when it saves a model: copy the file that has "
            "them, and its lines of the index, from the original checkpoint; or set mtp_num_hidden_layers to 0; or "
            "train the layer from random weights with --random-mtp (random_mtp=True)."
        )


def without_mtp(config: Config) -> Config:
    """The config of the model without its MTP layer."""
    return replace(config, text=replace(config.text, num_mtp_layers=0))


def mtp_rules(config: Config, layer_rules: Callable[[str, str], list[Rule]]) -> list[Rule]:
    """All rules of the MTP layer, none where the checkpoint has none.

    `layer_rules` gives those of one decoder layer between its HF and its Megatron name.
    """
    if not config.text.num_mtp_layers:
        return []
    hidden = config.text.hidden_size
    return [
        Copy("mtp.pre_fc_norm_embedding.weight", f"{_BLOCK}.enorm.weight", (hidden,)),
        Copy("mtp.pre_fc_norm_hidden.weight", f"{_BLOCK}.hnorm.weight", (hidden,)),
        Copy("mtp.fc.weight", f"{_BLOCK}.eh_proj.weight", (hidden, 2 * hidden)),
        *layer_rules(f"{HF_LAYERS}.0", f"{_BLOCK}.transformer_layer"),
        Copy("mtp.norm.weight", f"{_BLOCK}.final_layernorm.weight", (hidden,)),
    ]
