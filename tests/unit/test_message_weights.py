"""The weights of messages become those of the labels of a pack."""

import math
from typing import Any

import pytest
import torch

from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.messages import check_conversation
from megatron_vlbridge.data.packing.packs import build_pack
from tests.errors import rejects
from tests.unit.test_turns import processor_with

NEWLINE = LabelOptions(newline=True)


def talk(*answers: dict[str, Any]) -> list[dict[str, Any]]:
    return [x for own in answers for x in ({"role": "user", "content": "q"}, {"role": "assistant", **own})]


def encode(*answers: dict[str, Any], **options: Any) -> Sample:
    return encode_conversation(talk(*answers), processor_with("qwen3_vl"), **options)


@pytest.mark.parametrize("labels", [LabelOptions(), NEWLINE], ids=["no newline", "newline"])
def test_a_weight_is_that_of_the_message_and_of_nothing_else(labels: LabelOptions) -> None:
    """By hand: each message is encoded as the only learned one, which gives its tokens."""
    answers = [{"content": "a", "weight": 0.25}, {"content": "b"}, {"content": "c", "weight": 3}]
    sample = encode(*answers, labels=labels)
    expected = torch.zeros(len(sample.input_ids))
    for number, answer in enumerate(answers):
        alone = [{"content": x["content"], "train": x is answer} for x in answers]
        own = encode(*alone, labels=labels)
        assert torch.equal(own.input_ids, sample.input_ids)
        assert int(own.loss_mask.sum()) == (3 if labels is NEWLINE else 2), number
        expected[own.loss_mask] = answer.get("weight", 1)
    assert torch.equal(sample.loss_weights, expected)
    assert torch.equal(sample.loss_mask, expected > 0)


def test_a_message_of_weight_zero_is_not_learned() -> None:
    sample = encode({"content": "a", "weight": 0}, {"content": "b", "weight": 1})
    other = encode({"content": "a", "train": False}, {"content": "b"})
    assert torch.equal(sample.loss_mask, other.loss_mask)
    assert sample.skipped_turns == other.skipped_turns == (1,)
    assert sample.loss_weights is None
    with rejects("no supervised token", "the weight 0"):
        encode({"content": "a", "weight": 0})


def test_the_weights_of_a_pack_are_those_of_its_labels() -> None:
    samples = [encode({"content": "a", "weight": 0.5}, {"content": "b"}), encode({"content": "c"})]
    pack = build_pack(samples, sum(len(x.input_ids) for x in samples) + 3, 0)
    expected = []
    for sample in samples:
        weights = [1.0] * len(sample.input_ids) if sample.loss_weights is None else sample.loss_weights.tolist()
        mask = sample.loss_mask.tolist()
        expected += [weights[i + 1] if i + 1 < len(mask) and mask[i + 1] else 1.0 for i in range(len(mask))]
    assert pack["loss_weights"].tolist() == [*expected, 1, 1, 1]
    assert expected.count(0.5) == 2
    assert pack["loss_weights"].dtype == torch.float32
    assert "loss_weights" not in build_pack(samples[1:], 64, 0)


def test_the_last_token_of_a_weighted_sample_has_no_label() -> None:
    """With the newline learned, the first token of the sample would get the weight of its last one."""
    sample = encode({"content": "a", "weight": 0.5}, labels=NEWLINE)
    pack = build_pack([sample], len(sample.input_ids), 0)
    learned = pack["labels"] != -100
    assert pack["loss_weights"][learned].tolist() == [0.5] * int(learned.sum())
    assert pack["loss_weights"][~learned].tolist() == [1.0] * int((~learned).sum())


@pytest.mark.parametrize("weight", [-1, "2", None, True, math.nan, math.inf, 1e-9, 1001])
def test_another_weight_is_rejected(weight: object) -> None:
    with rejects("message 1 (assistant): expected 'weight' to be 0, or from 0.001 to 1000"):
        check_conversation(talk({"content": "a", "weight": weight}))


def test_a_weight_that_contradicts_train_is_rejected() -> None:
    check_conversation(
        talk({"content": "a", "weight": 0, "train": False}, {"content": "a", "weight": 2, "train": True})
    )
    for weight, train in ((2, False), (0, True)):
        with rejects("message 1 (assistant): 'train'", f"contradicts 'weight' {weight}"):
            check_conversation(talk({"content": "a", "weight": weight, "train": train}))
