"""Which weights of a checkpoint get an adapter: by the names that `peft` takes, or by patterns of full paths."""

import re
from collections.abc import Sequence

from megatron_vlbridge import families
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families.experts import ExpertForm
from megatron_vlbridge.weights import RuleTable

# Megatron's linear layers that can have an adapter: not the head, a router, a convolution, the shared expert's gate.
_LINEAR = re.compile(r"\.(linear_qkv|linear_proj|linear_fc1|linear_fc2|in_proj|out_proj|eh_proj)\.weight(\.\w+)?$")
_VISION = "vision_model."
_PATTERN = re.compile(r"[\\^$*+?()\[\]{}|]")
_SHOWN = 3


def lora_table(hf_config: Config) -> RuleTable:
    """The rules between the model and the weights that transformers holds, which are those that adapters are for."""
    return families.find(hf_config).table(hf_config, ExpertForm.FUSED_OUT_IN)


def module_of(weight: str) -> str:
    """The name of a weight as a target: its module, or the parameter of the experts itself."""
    return weight.removesuffix(".weight")


def select_weights(hf_config: Config, targets: Sequence[str] | None = None, vision: bool = False) -> list[str]:
    """The names of the Hugging Face weights that get an adapter, in the order of the checkpoint.

    A target is a name (`q_proj`, `self_attn.q_proj`; of the experts `mlp.experts.gate_up_proj` or
    `mlp.experts.down_proj`, as in `target_parameters` of `peft`), which is looked for at the end of the modules of the
    decoder layers, with `vision` of the vision tower too; the full path of a module; or, with a special character, a
    regular expression for full paths. Without targets: all projections, but not the router.

    Raises VLBridgeError: no target, one that matches nothing, something else than a projection, or is not a regular
    expression. Example: `select_weights(config, ["q_proj", "v_proj"])`.
    """
    table, layers = lora_table(hf_config), families.find(hf_config).layers + "."
    linear: dict[str, bool] = {}
    scope: dict[str, bool] = {}
    for move in table.moves:
        module = module_of(move.hf.name)
        linear[module] = linear.get(module, True) and bool(_LINEAR.search(move.megatron.name))
        scope[module] = module.startswith(layers) or (vision and move.megatron.name.startswith(_VISION))
    weights = {module_of(name): name for name in table.hf_shapes}
    if targets is None:
        return [weights[module] for module in weights if linear[module] and scope[module]]
    if not targets or isinstance(targets, str):
        raise VLBridgeError(
            f"LoRA targets: expected a list of at least one, found {targets or 'none'}. Name some, such as q_proj and "
            "v_proj."
        )
    chosen = {module for target in targets for module in _matching(target, linear, scope)}
    return [name for module, name in weights.items() if module in chosen]


def _matching(target: str, linear: dict[str, bool], scope: dict[str, bool]) -> list[str]:
    """The modules that a target names, all of which must be projections."""
    if _PATTERN.search(target):
        try:
            found = [module for module in linear if re.fullmatch(target, module)]
        except re.error as error:
            raise VLBridgeError(
                f"LoRA target {target!r}: expected a name or a regular expression, found {error}. "
                "Escape special characters with a backslash."
            ) from error
        elsewhere = []
    else:
        ends = [module for module in linear if _is_named(module, target)]
        found = [module for module in ends if scope[module] or module == target]
        elsewhere = [module for module in ends if not scope[module]]
    if not found:
        known = sorted({_short(module) for module, inside in scope.items() if inside and linear[module]})
        outside = f", but {_some(elsewhere)} outside of them" if elsewhere else ""
        raise VLBridgeError(
            f"LoRA target {target!r}: expected a projection of the decoder layers, found none{outside}. Use some of "
            f"{', '.join(known)}; vision=True (--lora-vision) adds the vision tower, and a regular expression is "
            "matched with full paths."
        )
    if others := [module for module in found if not linear[module]]:
        raise VLBridgeError(
            f"LoRA target {target!r}: expected only projections, found {_some(others)} too, which cannot have an "
            "adapter. Name the modules by more of their path, or by a regular expression for full paths."
        )
    return found


def _is_named(module: str, target: str) -> bool:
    """`peft`'s rule for a list of names; its `target_modules` do not reach the parameters of experts."""
    if _is_of_experts(module) and "experts." not in target:
        return False
    return module == target or module.endswith(f".{target}")


def _is_of_experts(module: str) -> bool:
    return module.rpartition(".")[0].endswith(".experts")


def _short(module: str) -> str:
    """The name of a module in a layer."""
    return ".".join(module.split(".")[-3 if _is_of_experts(module) else -1 :])


def _some(modules: Sequence[str]) -> str:
    more = f" and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
    return ", ".join(modules[:_SHOWN]) + more
