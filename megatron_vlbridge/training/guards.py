"""What has been proved equal to the reference may start; everything else is refused."""

import weakref
from itertools import product

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlbridge.backends import cpu_runtime, te
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.vlm import Qwen3VLModel
from megatron_vlbridge.training.settings import setting_faults

# The parallel dimensions above one that the rows of tests/functional/matrix.py run together; sizes are arithmetic.
# Each is run with and without recomputation (full, selective), multi-token prediction and tied embeddings.
_PIPELINES = ("", "pp", "pp vpp")
_DENSE = ("", "tp", "tp sp")
_EXPERTS = ("", "ep", "tp sp", "tp sp etp", "tp sp ep", "tp sp ep etp")

_accepted: weakref.WeakSet[Qwen3VLModel] = weakref.WeakSet()


def proved_combinations(checkpoint: Config) -> list[frozenset[str]]:
    """The sets of parallel dimensions that are proved together for this kind of model, with any data-parallel size.

    `tp`, `sp`, `pp`, `vpp`, `cp`, `ep` and `etp` (expert tensor parallel) stand for a size above one.
    """
    kinds = _DENSE if checkpoint.text.moe is None else _EXPERTS
    return [frozenset(" ".join(names).split()) for names in product(kinds, _PIPELINES, ("", "cp"))]


def used_dimensions(config: TransformerConfig, checkpoint: Config) -> frozenset[str]:
    """The parallel dimensions above one in `config`."""
    experts = 1 if checkpoint.text.moe is None else config.expert_tensor_parallel_size
    sizes = {
        "tp": config.tensor_model_parallel_size,
        "sp": 2 if config.sequence_parallel else 1,
        "pp": config.pipeline_model_parallel_size,
        "vpp": config.virtual_pipeline_model_parallel_size or 1,
        "cp": config.context_parallel_size,
        "ep": config.expert_model_parallel_size,
        # Megatron's default is the tensor-parallel size.
        "etp": experts or config.tensor_model_parallel_size,
    }
    return frozenset(name for name, size in sizes.items() if size > 1)


def check_combination(config: TransformerConfig, checkpoint: Config) -> None:
    """Refuse parallel dimensions together that no test runs together for this kind of model.

    Raises:
        VLBridgeError: naming the combination and the nearest ones that are proved.
    """
    used, proved = used_dimensions(config, checkpoint), proved_combinations(checkpoint)
    if used not in proved:
        nearest = sorted(proved, key=lambda names: (len(names ^ used), _words(names)))[:3]
        raise VLBridgeError(
            f"{checkpoint.architecture}: the dimensions {_words(used)} together are not proved equal to transformers, "
            f"so they are refused. The nearest that are: {', '.join(map(_words, nearest))}; each with any "
            "data-parallel size (docs/layouts.md). To run it all the same: --allow-unproved-combination"
        )


def check_cp_comm_type(config: TransformerConfig) -> None:
    """Refuse an exchange between context-parallel ranks (`cp_comm_type`) that the kernels here do not support.

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


def check_layout(config: TransformerConfig, checkpoint: Config, *, any_combination: bool = False) -> None:
    """Refuse a layout that no test proves for this family; with `any_combination` only settings, not combinations.

    Raises:
        VLBridgeError: naming every setting that is not proved, and what is.
    """
    if not any_combination:
        check_combination(config, checkpoint)
    check_cp_comm_type(config)
    faults = setting_faults(config, checkpoint)
    if not cpu_runtime.is_enabled():
        faults += te.faults(config)
    if config.virtual_pipeline_model_parallel_size and not config.overlap_p2p_comm:
        faults.append("virtual pipeline stages without overlap_p2p_comm: two stages mistake what they send each other")
    faults += _mtp_faults(config, checkpoint)
    if faults:
        raise VLBridgeError(
            f"{checkpoint.architecture}: not proved equal to transformers, so it is refused:\n  " + "\n  ".join(faults)
        )


def accept(model: Qwen3VLModel) -> None:
    """Note that :func:`check_layout` has admitted this model's layout."""
    _accepted.add(model)


def check_model(model: Qwen3VLModel, *, any_combination: bool = False) -> None:
    """:func:`check_layout` of a model that has not been accepted yet: one that another `model_provider` built."""
    if model not in _accepted:
        check_layout(model.config, model.checkpoint, any_combination=any_combination)
        accept(model)


def _words(names: frozenset[str]) -> str:
    return " x ".join(sorted(names, key=["tp", "sp", "pp", "vpp", "cp", "ep", "etp"].index)) or "none"


def _mtp_faults(config: TransformerConfig, checkpoint: Config) -> list[str]:
    found, expected = config.mtp_num_layers or 0, checkpoint.text.num_mtp_layers
    if found != expected:
        return [f"multi-token prediction: mtp_num_layers={found}, the checkpoint's config says {expected}"]
    grouped = config.recompute_method == "uniform" and config.recompute_num_layers != 1
    if found and config.recompute_granularity == "full" and grouped:
        words = "full recomputation of several layers at once with a prediction layer"
        return [f"{words}: recompute_num_layers={config.recompute_num_layers!r}, proved: 1"]
    losses = {name: getattr(config, name) for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff")}
    if found and checkpoint.text.moe is not None and any(losses.values()):
        return [f"losses of the router with a prediction layer: {losses}, proved: none"]
    return []
