"""What is verified equal to the reference may start, and what the user names; everything else is rejected."""

from collections.abc import Collection

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge import families
from megatron_vlbridge.backends import cpu_runtime, te
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.router import balancing_types
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.settings import setting_faults

ALLOW = "--allow-unverified"
"""The argument that admits what it names."""


def used_dimensions(config: TransformerConfig, hf_config: Config) -> frozenset[str]:
    """The parallel dimensions above one in `config`, of those that the model has."""
    # Megatron's default is the tensor-parallel size, also for a model without experts.
    etp = config.expert_tensor_parallel_size or config.tensor_model_parallel_size
    sizes = {
        "tp": config.tensor_model_parallel_size,
        "sp": 2 if config.sequence_parallel else 1,
        "pp": config.pipeline_model_parallel_size,
        "vpp": config.virtual_pipeline_model_parallel_size or 1,
        "cp": config.context_parallel_size,
        "ep": config.expert_model_parallel_size,
        "etp": etp if "etp" in families.find(hf_config).dimensions else 1,
    }
    return frozenset(name for name, size in sizes.items() if size > 1)


def check_combination(
    config: TransformerConfig, hf_config: Config, allow: Collection[str] = (), *, has_argument: bool = True
) -> set[str]:
    """Reject parallel dimensions together that no test runs together for this family; the names needed of `allow`.

    `has_argument`: the error names the argument that admits them.

    Raises:
        VLBridgeError: naming the combination and the nearest ones that are verified.
    """
    used, verified = used_dimensions(config, hf_config), families.find(hf_config).combinations
    name = _words(used, "+")
    if used not in verified and name in allow:
        return {name}
    if used not in verified:
        nearest = sorted(verified, key=lambda names: (len(names ^ used), _words(names)))[:3]
        raise VLBridgeError(
            f"{hf_config.architecture}: the dimensions {_words(used)} together are not verified equal to "
            f"transformers, so they are rejected. The nearest that are: {', '.join(map(_words, nearest))}; each with "
            "any data-parallel size (docs/layouts.md)." + (f" {allow_words({name}, allow)}" if has_argument else "")
        )
    return set()


def check_cp_comm_type(config: TransformerConfig) -> None:
    """Reject an exchange between context-parallel ranks (`cp_comm_type`) that the kernels here do not support.

    Raises:
        VLBridgeError: naming what the kernels do not support, and what they do.
    """
    ranks = config.context_parallel_size
    if ranks == 1:
        return
    asked = config.cp_comm_type if isinstance(config.cp_comm_type, list) else [config.cp_comm_type or "p2p"]
    supported = ("p2p",) if cpu_runtime.is_enabled() else ("p2p", "a2a", "all_gather")
    if unknown := sorted(set(asked) - set(supported)):
        raise VLBridgeError(
            f"cp_comm_type: the kernels here support {', '.join(supported)}, found {', '.join(unknown)}"
        )
    if not cpu_runtime.is_enabled():
        te.check_context_parallel(config)
    size = config.tensor_model_parallel_size
    heads, groups = config.num_attention_heads // size, max(1, config.num_query_groups // size)
    if "a2a" in asked and (heads % ranks or groups % ranks or heads % 2 or groups % 2):
        # Source: the assertions of Transformer Engine's AttnFuncWithCPAndQKVOA2A and FusedAttention.
        raise VLBridgeError(
            f"cp_comm_type a2a spreads the heads over {ranks} context-parallel ranks: each tensor-parallel rank has "
            f"{heads} query and {groups} key-value heads, expected even multiples of {ranks}. Use p2p or all_gather"
        )


def check_layout(
    config: TransformerConfig, hf_config: Config, *, allow: Collection[str] = (), own_loss: bool = False
) -> set[str]:
    """Reject a layout that no test verifies for this family, but for what `allow` names; gives those that were needed.

    `own_loss`: the caller makes the loss from logits, or from the token losses, and averages it. Without an MTP layer
    `calculate_per_token_loss`, which `vlm_step` needs, is then free.

    A name is that of a setting, such as `recompute_modules`, or dimensions that are not verified together, such as
    `tp+ep`. What the checkpoint decides and what does not work at all cannot be allowed.

    Raises:
        VLBridgeError: naming every setting that is not verified, and the values that are.
    """
    # Who makes the loss has a script without the argument.
    needed = check_combination(config, hf_config, allow, has_argument=not own_loss)
    check_cp_comm_type(config)
    found = setting_faults(config, hf_config)
    if own_loss and not config.mtp_num_layers:
        found.pop("calculate_per_token_loss", None)
    allowable = found.keys() - families.find(hf_config).language_fields(hf_config).keys()
    needed |= allowable & set(allow)
    faults = [line for name, line in found.items() if name not in needed]
    asked = allowable - needed
    if not cpu_runtime.is_enabled():
        faults += te.faults(config, linear_attention=bool(hf_config.text.num_linear_key_heads))
    if config.virtual_pipeline_model_parallel_size and not config.overlap_p2p_comm:
        faults.append("virtual pipeline stages without overlap_p2p_comm: stages may receive each other's messages")
    recomputed = config.recompute_modules or [] if config.recompute_granularity == "selective" else []
    if "seq_aux_loss" in balancing_types(config) and "moe" in recomputed:
        faults.append("seq_aux_loss with moe in recompute_modules: its router would see the segments of a later pack")
    faults += _mtp_faults(config, hf_config)
    if faults:
        raise VLBridgeError(
            f"{hf_config.architecture}: not verified equal to transformers, so it is rejected:\n  "
            + "\n  ".join(faults)
            + (f"\n{allow_words(asked, allow)}" if len(asked) == len(faults) and not own_loss else "")
        )
    return needed


def check_model(model: Qwen3VLModel, *, allow: Collection[str] = ()) -> None:
    """:func:`check_layout` of a model, once: its layout does not change afterwards."""
    if not model.layout_checked:
        check_layout(model.config, model.hf_config, allow=allow)
        model.layout_checked = True


def allow_words(names: Collection[str], allow: Collection[str]) -> str:
    """The argument that admits `names` too, for an error that rejects them."""
    return f"To run it all the same: {ALLOW} {','.join(sorted({*names, *allow}))}"


def _words(names: frozenset[str], separator: str = " x ") -> str:
    return separator.join(sorted(names, key=["tp", "sp", "pp", "vpp", "cp", "ep", "etp"].index)) or "none"


def _mtp_faults(config: TransformerConfig, hf_config: Config) -> list[str]:
    found, expected = config.mtp_num_layers or 0, hf_config.text.num_mtp_layers
    if found != expected:
        return [f"multi-token prediction: mtp_num_layers={found}, the checkpoint's config says {expected}"]
    if not found:
        return []
    verified = dict(families.find(hf_config).mtp_settings)
    if config.recompute_granularity == "full" and config.recompute_method == "uniform":
        verified["recompute_num_layers"] = (1,)
    return [
        f"with an MTP layer: {name}={getattr(config, name)!r}, verified: {values[0]!r}"
        for name, values in verified.items()
        if getattr(config, name) not in values
    ]
