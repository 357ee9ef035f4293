"""Conversations that are too long end after the last turn that fits, with their media; others are left as they are."""

import random
from typing import Any

import pytest
import torch

from megatron_vlbridge.data.chat import encode_conversation
from megatron_vlbridge.data.conversations import FileConversation
from megatron_vlbridge.data.lengths.measure import Measure
from megatron_vlbridge.data.packing.truncation import Truncation, truncate
from megatron_vlbridge.errors import VLBridgeError
from tests import label_cases
from tests.label_cases import IMAGE, PICTURE, Q, R, bot, instruct, learned, result, text, thought, turn, user
from tests.label_cases_tools import JSON_LOOK, LOOK, NO_RESULTS, TAGS_LOOK
from tests.unit.test_label_masks import marked, processor_of


def cut(conversations: list[Any], family: str, limit: int, **options: Any) -> Truncation:
    """The conversations after the cut to at most `limit` tokens."""
    measure = Measure(processor_of(family), 1152, **options)
    table = measure(conversations, range(len(conversations)))
    long = (table.rows["tokens"] > limit).nonzero()[0].tolist()
    return truncate(conversations, table, measure, long, lambda row: row["tokens"] <= limit)


LONG = "word " * 200 + "end"
IMAGES = [user(PICTURE, text("Q")), bot("A"), user(text("R"), PICTURE), bot("B"), user(PICTURE, text(LONG)), bot("C")]
# A conversation, and of each family its marked text after a cut to 100 tokens.
CASES = {
    "the last turns": (
        [user("Q"), bot("A"), user("R"), bot("B"), user(LONG), bot("C")],
        instruct(Q + learned("A") + R + learned("B"), Q + turn("assistant", "A") + R + thought("B")),
    ),
    "the answer": (
        [user("Q"), bot("A"), user("R"), bot(LONG)],
        instruct(Q + learned("A"), Q + thought("A")),
    ),
    "images of the last turns": (
        IMAGES,
        instruct(
            turn("user", f"{IMAGE}Q") + learned("A") + turn("user", f"R{IMAGE}") + learned("B"),
            turn("user", f"{IMAGE}Q") + turn("assistant", "A") + turn("user", f"R{IMAGE}") + thought("B"),
        ),
    ),
    "a turn that is not learned": (
        [user("Q"), bot("A"), user("R"), bot("B", train=False), user(LONG), bot("C")],
        instruct(Q + learned("A"), Q + thought("A")),
    ),
    "the result of a call": (
        [user("Q"), bot("", tool_calls=LOOK), result(LONG), bot("A")],
        label_cases.families(NO_RESULTS, Q + learned(JSON_LOOK), Q + thought(TAGS_LOOK)),
    ),
    "two answers in a row": (
        [user("Q"), bot("A"), bot("B"), bot(LONG)],
        instruct(Q + learned("A") + learned("B"), Q + thought("A") + thought("B")),
    ),
}


# Qwen2.5-VL has no tools: test_label_masks.py
MARKED = [(name, family) for name, (_, texts) in CASES.items() for family in texts if isinstance(texts[family], str)]


@pytest.mark.parametrize(("name", "family"), MARKED)
def test_the_labels_of_a_cut_conversation_are_those_marked_by_hand(name: str, family: str) -> None:
    messages, expected = CASES[name]
    found = cut([messages], family, 100)
    sample = encode_conversation(found.conversations[0], processor_of(family))
    assert marked(sample, processor_of(family)) == expected[family]
    assert found.table.rows["tokens"].tolist() == [len(sample.input_ids)]
    assert len(sample.image_grid_thw) == expected[family].count(IMAGE)
    assert found.kept == {0: len(found.conversations[0])}


@pytest.mark.parametrize("family", label_cases.FAMILIES)
def test_the_cut_is_after_the_last_turn_that_fits(family: str) -> None:
    """Every prefix is encoded, from the longest to the shortest."""
    chance, processor = random.Random(5), processor_of(family)
    conversations: list[Any] = []
    for _ in range(25):
        messages = []
        for _ in range(chance.randrange(1, 6)):
            parts = [text("word " * chance.randrange(30)), *[PICTURE] * chance.randrange(3)]
            # An answer that starts with a newline is not learned by the templates that keep it.
            answer = "\n" * (chance.random() < 0.3) + "word " * chance.randrange(30) + "end"
            messages += [user(*parts), bot(answer, train=chance.random() < 0.8)]
        conversations.append(messages[: len(messages) - chance.randrange(2)])
    limit = 55
    found = cut(conversations, family, limit)
    fates = set()
    for index, messages in enumerate(conversations):
        whole, expected = length(messages, processor), len(messages)
        if whole > limit:  # an invalid one is not too long
            ends = [end for end in range(len(messages) - 1, 0, -1) if messages[end - 1].get("train")]
            expected = next((end for end in ends if 0 < length(messages[:end], processor) <= limit), expected)
        assert len(found.conversations[index]) == expected
        assert found.kept.get(index, len(messages)) == expected
        fates.add((index in found.kept, length(found.conversations[index], processor) <= limit))
        if index in found.kept:
            sample = encode_conversation(found.conversations[index], processor)
            row = found.table.rows[index]
            assert row["tokens"] == len(sample.input_ids)
            assert row["patches"] == len(sample.pixel_values)
            assert row["assistant_turns"] == sum(m["role"] == "assistant" for m in messages[:expected])
    assert fates == {(True, True), (False, True), (False, False)}


@pytest.mark.parametrize("limited", ["tokens", "patches"])
@pytest.mark.parametrize("family", label_cases.FAMILIES)
def test_few_cuts_are_measured(family: str, limited: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many turns there are."""
    measured = []
    encode = Measure.encode

    def counted(self: Measure, conversation: Any, index: int = 0) -> Any:
        measured.append(len(conversation))
        return encode(self, conversation, index)

    messages = [user(text("Q"), PICTURE), bot("A")] * 100
    measure = Measure(processor_of(family), 1152)
    whole = measure([messages], range(1))
    limit = int(whole.rows[0][limited] * 0.7)
    monkeypatch.setattr(Measure, "encode", counted)
    found = truncate([messages], whole, measure, [0], lambda row: row[limited] <= limit)
    assert 130 < found.kept[0] <= 140
    assert found.table.rows[0][limited] <= limit
    assert len(measured) <= 3


def length(messages: list[Any], processor: Any) -> int:
    """The tokens of a conversation, 0 if it is invalid."""
    try:
        return len(encode_conversation(messages, processor).input_ids)
    except VLBridgeError:
        return 0


def test_a_cut_conversation_of_a_file_keeps_its_place_and_tools() -> None:
    tools = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]
    conversation = FileConversation([user("Q"), bot("A"), user(LONG), bot("B")], "a.jsonl, line 3", tools)
    whole = cut([conversation], "qwen3_vl", 5000)
    assert whole.conversations[0] is conversation
    assert whole.kept == {}
    found = cut([conversation], "qwen3_vl", 200).conversations[0]
    assert isinstance(found, FileConversation)
    assert (found, found.location, found.tools) == (conversation[:2], "a.jsonl, line 3", tools)
    assert len(conversation) == 4


def test_the_table_that_was_given_is_not_changed() -> None:
    measure = Measure(processor_of("qwen3_vl"), 1152)
    conversations = [[user("Q"), bot("A"), user(LONG), bot("B")]]
    table = measure(conversations, range(1))
    table.rows.flags.writeable = False  # as one that is mapped into memory
    before = table.rows.copy()
    found = truncate(conversations, table, measure, [0], lambda row: row["tokens"] < 100)
    assert torch.tensor(found.table.rows["tokens"]) < torch.tensor(before["tokens"])
    assert (table.rows == before).all()
