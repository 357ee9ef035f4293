"""Adapters trained on Megatron are those of peft: the same logits, and the same gradient of each of its tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from megatron_vlbridge import read_config
from megatron_vlbridge.weights.adapters import adapter_tensor
from tests import lora_reference, reference
from tests.closeness import relative_error
from tests.functional import lora_ranks, matrix, parity, ranks
from tests.functional.pool import Layout, Pool
from tests.functional.test_lora_weights import in_peft, values_of

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEAR = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
VISION = [r"model\.visual\.blocks\..*(qkv|proj|fc1|fc2)"]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    workers = Pool()
    yield workers
    workers.close()


@pytest.mark.filterwarnings("error:.*(unexpected|missing).*:UserWarning")
@pytest.mark.parametrize(
    ("kind", "layout", "targets"),
    [
        ("dense", Layout(), SEVEN),
        ("dense", Layout(tp=2, sp=True, world=2), [*SEVEN, *VISION]),
        ("dense", Layout(pp=2, vpp=2, world=2), SEVEN),
        ("experts", Layout(ep=2, world=2), [*SEVEN[:4], *FUSED]),
        ("linear", Layout(cp=2, world=2), [*SEVEN, *LINEAR]),
        ("linear-experts", Layout(tp=2, sp=True, pp=2, cp=2, world=8), None),
    ],
    ids=str,
)
def test_logits_and_gradients_are_those_of_peft(
    pool: Pool, tmp_path: Path, kind: str, layout: Layout, targets: list[str] | None
) -> None:
    folder, groups = reference.write_checkpoint(tmp_path / "base", **reference.KINDS[kind]), matrix.groups()
    pairs = lora_reference.random_pairs(folder, targets)
    settings = {"rank": lora_reference.RANK, "alpha": lora_reference.ALPHA, "targets": targets}
    lora = {**settings, "values": values_of(pairs)}
    pool.run(lora_ranks.out, layout, folder=folder, lora=lora, target=tmp_path / "peft", saved=tmp_path / "saved")
    logits, gradients = run_peft(folder, tmp_path / "peft", [c for group in groups for c in group])
    assert gradients.keys() == in_peft(pairs).keys()

    packs = [reference.pack(group, parity.PACK_LENGTH) for group in groups]
    results = pool.run(ranks.forward_backward, layout, folder=folder, packs=packs, lora=lora)
    bound, lengths = parity.tolerance(read_config(folder)), [[len(c.tokens) for c in group] for group in groups]
    found = parity._cut(ranks.of_packs(results, "logits", layout, lengths), lengths)
    assert all(relative_error(x, y) < bound for x, y in zip(found, logits, strict=True))
    shards = ranks.assemble([result["gradients"] for result in results])
    both = {name: (shards[adapter_tensor(name, "A")], shards[adapter_tensor(name, "B")]) for name in pairs}
    for name, x in in_peft(both).items():
        assert gradients[name].any()
        assert relative_error(x, gradients[name]) < bound, name


def run_peft(folder: Path, adapter: Path, conversations: list[Any]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The logits of each conversation, and the gradients of the mean loss, by the names in peft's files."""
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
    with reference.recurrent_delta_rule():
        logits = [model(**reference.model_inputs(c)).logits[0] for c in conversations]
    losses = [reference.token_losses(x, c.labels) for x, c in zip(logits, conversations, strict=True)]
    (torch.cat(losses).sum() / sum(int((c.labels != -100).sum()) for c in conversations)).backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return [x.detach() for x in logits], gradients
