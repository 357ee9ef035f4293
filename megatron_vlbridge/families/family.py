"""What a family declares."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

from megatron_vlbridge.config import Config, ConfigFormat
from megatron_vlbridge.errors import UsageError, VLBridgeError
from megatron_vlbridge.families.experts import HUB, ExpertForm, detect_form, has_single_experts, moe_layers
from megatron_vlbridge.families.mtp import HF_LAYERS as MTP_LAYERS
from megatron_vlbridge.weights import Rule, RuleTable, TensorSpec


def combinations(*choices: Sequence[str]) -> frozenset[frozenset[str]]:
    """Every set of parallel dimensions with one of each of the choices.

    Example: `combinations(("", "tp", "tp sp"), ("", "pp"))` holds six, among them `{"tp", "sp", "pp"}`.
    """
    return frozenset(frozenset(" ".join(names).split()) for names in product(*choices))


@dataclass(frozen=True)
class Family:
    """One architecture: all that tells it from another.

    `config` is the format of its `config.json`, `rules` makes its rules from a `Config` and the forms of the
    decoder's and of the MTP layer's experts. `embedding` and `head` are the HF names of the two ends that
    `tie_word_embeddings` makes one, `layers` the HF name of the decoder layers, `expert_form` the form of the
    experts on the Hub.

    `language_fields` and `vision_fields` give the fields of Megatron's `TransformerConfig` that a checkpoint decides.

    `combinations` are the sets of parallel dimensions that the tests run together (`tests/functional/matrix.py`), with
    any data-parallel size; `tp`, `sp`, `pp`, `vpp`, `cp`, `ep` and `etp` (expert tensor parallel) stand for a size
    above one. `other_tensors` are patterns (`proj_in.*`, as in a shell) of what its files may hold beside the model.
    `mtp_settings` are the only values of some settings that are verified with an MTP layer.
    """

    config: ConfigFormat
    rules: Callable[[Config, ExpertForm, ExpertForm], list[Rule]]
    embedding: str
    head: str
    layers: str
    language_fields: Callable[[Config], dict[str, Any]]
    vision_fields: Callable[[Config], dict[str, Any]]
    combinations: frozenset[frozenset[str]]
    mtp_settings: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    expert_form: ExpertForm = ExpertForm.FUSED_IN_OUT
    other_tensors: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """Its name in `config.json`."""
        return self.config.architecture

    @property
    def dimensions(self) -> frozenset[str]:
        """The parallel dimensions that some verified combination has."""
        return frozenset().union(*self.combinations)

    def find_other_tensors(self, hf: Iterable[str]) -> list[str]:
        """Those of a checkpoint's tensors that are known not to be part of the model."""
        return [name for name in hf if any(fnmatchcase(name, pattern) for pattern in self.other_tensors)]

    def find_expert_form(
        self, config: Config, hf: Mapping[str, TensorSpec] | None = None, asked: str | None = None
    ) -> ExpertForm:
        """How a checkpoint with the HF tensors `hf` holds its experts, or the form that the user `asked` for.

        The Hub's form where that is asked for, where neither decides, and where the model has no experts.

        Raises VLBridgeError where the shapes of the tensors match no form or both, UsageError for an unknown form.
        """
        if asked is None:
            return detect_form(config, hf or {}, self.layers, self.expert_form)
        if asked == HUB:
            return self.expert_form
        if asked not in tuple(ExpertForm):
            raise UsageError(f"experts: expected one of {', '.join((HUB, *ExpertForm))}, found {asked!r}.")
        if not moe_layers(config):
            raise VLBridgeError(
                f"experts: expected none for a model without experts, found {asked!r}. Leave the option out."
            )
        return ExpertForm(asked)

    def table_for(
        self, config: Config, hf: Mapping[str, TensorSpec] | None = None, asked: str | None = None
    ) -> RuleTable:
        """The rule table of a checkpoint with the HF tensors `hf`, or with experts in the form that the user `asked`.

        An MTP layer may store its experts in another form than the decoder. Where its names show that each
        expert has tensors of its own, it keeps them, whatever was asked.

        Raises VLBridgeError as `find_expert_form` does.
        """
        hf, experts = hf or {}, self.find_expert_form(config, hf, asked)
        if not (config.text.num_mtp_layers and config.text.mtp_layer_kind.experts):
            return self.table(config, experts)
        if has_single_experts(hf, MTP_LAYERS):
            return self.table(config, experts, ExpertForm.PER_EXPERT)
        return self.table(config, experts, experts if asked else detect_form(config, hf, MTP_LAYERS, experts, [0]))

    def table(
        self, config: Config, experts: ExpertForm | None = None, mtp_experts: ExpertForm | None = None
    ) -> RuleTable:
        """The rule table of a checkpoint with this config, whose experts have this form (default: the Hub's).

        `mtp_experts` is the form of the MTP layer's experts (default: that of the others).
        """
        experts = experts or self.expert_form
        return RuleTable(self.rules(config, experts, mtp_experts or experts))
