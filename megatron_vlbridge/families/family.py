"""What a family declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families.experts import ExpertForm, find_form, moe_layers
from megatron_vlbridge.weights import Rule, RuleTable, TensorSpec


@dataclass(frozen=True)
class Family:
    """One architecture: its rules, and the HF names of the two ends that `tie_word_embeddings` makes one.

    `layers` is the HF name of the decoder layers, and `expert_form` how the Hub holds their experts.
    """

    architecture: str
    rules: Callable[[Config, ExpertForm], list[Rule]]
    embedding: str
    head: str
    layers: str
    expert_form: ExpertForm = ExpertForm.FUSED_IN_OUT

    def find_expert_form(
        self, config: Config, hf: Mapping[str, TensorSpec] | None = None, asked: str | None = None
    ) -> ExpertForm:
        """How a checkpoint with the HF tensors `hf` holds its experts, or what the user `asked` for.

        The Hub's form where neither tells, and where the model has no experts.

        Raises VLBridgeError where the tensors do not tell their orientation or fit none, and for a form that is none.
        """
        if asked is None:
            return find_form(config, hf or {}, self.layers, self.expert_form)
        if asked not in tuple(ExpertForm):
            raise VLBridgeError(f"experts: expected one of {', '.join(ExpertForm)}, found {asked!r}.")
        if not moe_layers(config):
            raise VLBridgeError(
                f"experts: expected none for a model without experts, found {asked!r}. Leave the option out."
            )
        return ExpertForm(asked)

    def table(self, config: Config, experts: ExpertForm | None = None) -> RuleTable:
        """The rule table of a checkpoint with this config, whose experts are in this form (default: the Hub's)."""
        return RuleTable(self.rules(config, experts or self.expert_form))
