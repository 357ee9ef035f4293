"""What a family declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_vlbridge.config import Config
from megatron_vlbridge.weights import Rule, RuleTable


@dataclass(frozen=True)
class Family:
    """One architecture: its rules, and the HF names of the two ends that `tie_word_embeddings` makes one."""

    architecture: str
    rules: Callable[[Config], list[Rule]]
    embedding: str
    head: str

    def table(self, config: Config) -> RuleTable:
        """The rule table of a checkpoint with this config."""
        return RuleTable(self.rules(config))
