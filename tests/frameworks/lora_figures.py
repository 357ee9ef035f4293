"""How far adapters in a layout are from peft on transformers: logits, and the gradient of each A and B."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.peft.config import AdapterConfig
from megatron_vlbridge.checkpoint.peft.writer import write_adapter
from megatron_vlbridge.weights.adapters import adapter_tensor
from tests import lora_reference, reference
from tests.closeness import relative_error
from tests.functional import matrix, parity, ranks
from tests.functional.pool import Layout, Pool
from tests.functional.test_lora_weights import in_peft, values_of


@dataclass(frozen=True)
class Case:
    """A tiny model with adapters for `targets`, and what peft gives: logits of each conversation, and gradients."""

    base: Path
    targets: Sequence[str] | None
    pairs: lora_reference.Pairs
    logits: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]

    @property
    def bound(self) -> float:
        """What every error must be below."""
        return parity.tolerance(read_config(self.base))


@dataclass(frozen=True)
class Errors:
    """Of the logits the largest of all conversations, of the gradients each by its name in peft."""

    logits: float
    gradients: dict[str, float]

    @property
    def worst(self) -> str:
        """The name of the gradient with the largest error."""
        return max(self.gradients, key=lambda name: self.gradients[name])


def make_case(folder: Path, kind: str, targets: Sequence[str] | None) -> Case:
    """Write a model and a folder of its adapters, and run peft on transformers with both."""
    base = reference.write_checkpoint(folder / "base", **reference.KINDS[kind])
    pairs = lora_reference.random_pairs(base, targets)
    write_adapter(folder / "adapter", "base", AdapterConfig(lora_reference.RANK, lora_reference.ALPHA), pairs)
    logits, gradients = run_peft(base, folder / "adapter", [c for group in matrix.groups() for c in group])
    assert gradients.keys() == in_peft(pairs).keys()
    assert all(x.any() for x in gradients.values())
    return Case(base, targets, pairs, logits, gradients)


def run_peft(
    folder: Path, adapter: Path, conversations: Sequence[reference.Conversation]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The logits of each conversation, and the gradients of the mean loss, by the names in peft's files."""
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
    with reference.recurrent_delta_rule():
        logits = [model(**reference.model_inputs(c)).logits[0] for c in conversations]
    losses = [reference.token_losses(x, c.labels) for x, c in zip(logits, conversations, strict=True)]
    (torch.cat(losses).sum() / sum(int((c.labels != -100).sum()) for c in conversations)).backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return [x.detach() for x in logits], gradients


def measure(pool: Pool, layout: Layout, case: Case) -> Errors:
    """One training step of packs in a layout, against peft run conversation by conversation."""
    groups = matrix.groups()
    packs = [reference.pack(group, parity.PACK_LENGTH) for group in groups]
    lora = {"rank": lora_reference.RANK, "alpha": lora_reference.ALPHA, "targets": case.targets}
    results = pool.run(
        ranks.forward_backward, layout, folder=case.base, packs=packs, lora={**lora, "values": values_of(case.pairs)}
    )
    lengths = [[len(c.tokens) for c in group] for group in groups]
    logits = parity._cut(ranks.of_packs(results, "logits", layout, lengths), lengths)
    shards = ranks.assemble([result["gradients"] for result in results])
    found = in_peft(
        {name: (shards[adapter_tensor(name, "A")], shards[adapter_tensor(name, "B")]) for name in case.pairs}
    )
    return Errors(
        max(relative_error(x, y) for x, y in zip(logits, case.logits, strict=True)),
        {name: relative_error(found[name], x) for name, x in case.gradients.items()},
    )
