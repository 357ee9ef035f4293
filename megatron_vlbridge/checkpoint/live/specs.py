"""What an export of a live model will yield, from its config alone."""

import torch

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.dtypes import as_dtype
from megatron_vlbridge.checkpoint.hf.quantise import quantised_specs
from megatron_vlbridge.config import Config
from megatron_vlbridge.families.experts import fp8_form
from megatron_vlbridge.weights import RuleTable, TensorSpec


def hf_weight_specs(
    config: Config, *, dtype: str | torch.dtype | None = None, experts: str | None = None, fp8: bool = False
) -> dict[str, TensorSpec]:
    """Name -> `shape` and `dtype` of all that `export_hf_weights` yields, in its order, on every rank of every layout.

    `config` is that of the model (`read_config`, or `model.hf_config`); no model, process group or weights are needed.
    `experts` and `fp8` are the options of the export. `dtype` is that of the export, or that of the parameters where it
    has none; by default it is the one that the config names.

    Raises VLBridgeError and UsageError as `export_hf_weights` does where an option is invalid.
    Example: `hf_weight_specs(read_config("Qwen3-VL-2B-Instruct"))["lm_head.weight"].shape` is `(151936, 2048)`, if the
    head is not tied.
    """
    wanted = as_dtype(config.dtype if dtype is None else dtype)
    assert wanted is not None
    specs = {name: TensorSpec(shape, wanted) for name, shape in export_rules(config, experts, fp8).hf_shapes.items()}
    return quantised_specs(specs) if fp8 else specs


def export_rules(config: Config, experts: str | None, fp8: bool) -> RuleTable:
    """The rules of an export with these options."""
    form = fp8_form(config, experts) if fp8 else experts
    return families.find(config).table_for(config, None, form)
