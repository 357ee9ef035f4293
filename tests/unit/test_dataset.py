"""The dataset has every conversation once per epoch, one pack per index, and errors that name the conversation."""

import copy
import dataclasses
import json
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Qwen3VLConfig, Qwen3VLProcessor

from megatron_vlbridge import read_config
from megatron_vlbridge.config import Config
from megatron_vlbridge.data.chat import encode_conversation
from megatron_vlbridge.data.conversations import FileConversation
from megatron_vlbridge.data.dataset import PackedConversations, read_conversations
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.packing.offline import PackingOptions
from megatron_vlbridge.data.packing.packs import next_token_labels
from megatron_vlbridge.data.processors import published
from megatron_vlbridge.data.sources.mixture import open_data
from megatron_vlbridge.demo.tiny_processor import CHAT_TEMPLATE, build_processor
from tests.errors import rejects

SEQ_LENGTH = 96
SEEN = [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def processor() -> Qwen3VLProcessor:
    return build_processor(["hello", "seven"], patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)


@pytest.fixture(scope="module")
def config(processor: Qwen3VLProcessor, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return read_config(write_config(tmp_path_factory.mktemp("config"), processor))


def write_config(folder: Path, processor: Qwen3VLProcessor) -> Path:
    ids = {
        f"{name}_token_id": processor.tokenizer.convert_tokens_to_ids(f"<|{word}|>")
        for name, word in (("image", "image_pad"), ("video", "video_pad"))
    }
    ids |= {
        f"vision_{name}_token_id": processor.tokenizer.convert_tokens_to_ids(f"<|vision_{name}|>")
        for name in ("start", "end")
    }
    text = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
    vision = {"hidden_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64, "num_position_embeddings": 36}
    vision |= {"depth": 2, "deepstack_visual_indexes": [0]}
    hf = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        architectures=["Qwen3VLForConditionalGeneration"],
        dtype="float32",
        **ids,
    )
    hf.save_pretrained(folder)
    return folder


def make_conversation(index: int) -> list[dict[str, Any]]:
    """Of different lengths, with 0 to 2 images and sometimes a video."""
    random = np.random.default_rng(index)
    parts: list[dict[str, Any]] = [{"type": "text", "text": "hello" + " hello" * index}]
    for _ in range(index % 3):
        pixels = random.integers(0, 256, (8 * int(random.integers(1, 4)), 16, 3), dtype=np.uint8)
        parts.append({"type": "image", "image": Image.fromarray(pixels)})
    if index % 4 == 3:
        video = torch.from_numpy(random.integers(0, 256, (4, 3, 8, 16), dtype=np.uint8))
        parts.append({"type": "video", "video": video, "fps": 2.0})
    answer = "seven" + " seven" * (index % 2)
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


CONVERSATIONS = [make_conversation(index) for index in range(24)]


PACKINGS = {
    "best-fit": PackingOptions(),
    "decreasing": PackingOptions("first-fit-decreasing"),
    "limits": PackingOptions("first-fit-decreasing", max_patches=66, window=14, neighbors=2),
}


@pytest.fixture(scope="module", params=PACKINGS)
def dataset(processor: Qwen3VLProcessor, config: Config, request: pytest.FixtureRequest) -> PackedConversations:
    return make_dataset(processor, config, PACKINGS[request.param])


def make_dataset(
    processor: Qwen3VLProcessor, config: Config, packing: PackingOptions, seed: int = 1
) -> PackedConversations:
    return PackedConversations(
        CONVERSATIONS, processor, config, seq_length=SEQ_LENGTH, num_samples=60, seed=seed, packing=packing
    )


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_every_pack_concatenates_its_encoded_conversations(
    dataset: PackedConversations, processor: Qwen3VLProcessor
) -> None:
    for index in range(len(dataset)):
        batch = dataset[index]
        samples = [encode_conversation(CONVERSATIONS[member], processor) for member in dataset.members(index)]
        ends = batch["segment_lengths"].cumsum(0).tolist()
        assert len(batch["tokens"]) == SEQ_LENGTH
        assert len(ends) == len(samples)
        for sample, end in zip(samples, ends, strict=True):
            segment = slice(end - len(sample.input_ids), end)
            assert torch.equal(batch["tokens"][segment], sample.input_ids)
            assert torch.equal(batch["labels"][segment], next_token_labels([sample]))
        assert (batch["tokens"][ends[-1] :] == processor.tokenizer.pad_token_id).all()
        for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            assert torch.equal(batch[name], torch.cat([getattr(sample, name) for sample in samples])), name


def test_every_conversation_occurs_once_per_epoch_in_changing_packs(dataset: PackedConversations) -> None:
    epochs: list[list[list[int]]] = []
    index = 0
    while index < len(dataset):
        epoch: list[list[int]] = []
        while index < len(dataset) and sum(map(len, epoch)) < len(CONVERSATIONS):
            epoch.append(dataset.members(index))
            index += 1
        epochs.append(epoch)
    assert len(epochs) >= 3
    for epoch in epochs[:-1]:
        assert Counter(member for members in epoch for member in members) == Counter(range(len(CONVERSATIONS)))
    packs = [{frozenset(members) for members in epoch if len(members) > 1} for epoch in epochs[:-1]]
    assert packs[0]
    assert packs[0] != packs[1]


def test_an_item_depends_only_on_seed_and_index(
    dataset: PackedConversations, processor: Qwen3VLProcessor, config: Config
) -> None:
    resumed = make_dataset(processor, config, dataset.packing)
    for index in (47, 2, 30, 2):
        assert equal(resumed[index], dataset[index])
    other = make_dataset(processor, config, dataset.packing, seed=2)
    assert [other.members(index) for index in SEEN] != [dataset.members(index) for index in SEEN]


def test_workers_return_the_same_packs_with_a_batch_dimension(dataset: PackedConversations) -> None:
    subset = torch.utils.data.Subset(dataset, SEEN)
    for index, batch in zip(SEEN, DataLoader(subset, batch_size=1, num_workers=2), strict=True):
        assert equal({key: value[0] for key, value in batch.items()}, dataset[index])


@pytest.mark.parametrize("index", [60, -1])
def test_an_index_out_of_range_is_an_index_error(dataset: PackedConversations, index: int) -> None:
    with pytest.raises(IndexError):
        dataset[index]


def patches_of(batch: dict[str, torch.Tensor]) -> int:
    return len(batch["pixel_values"]) + len(batch["pixel_values_videos"])


def test_packs_keep_the_limit_on_patches_and_neighbors_have_like_work(
    processor: Qwen3VLProcessor, config: Config
) -> None:
    limited = make_dataset(processor, config, PACKINGS["limits"])
    assert max(patches_of(limited[index]) for index in range(60)) <= 66
    free = make_dataset(processor, config, PackingOptions("first-fit-decreasing", neighbors=7))
    work = [patches_of(free[index]) for index in range(60)]
    assert max(work) > 66
    ends = [free.plan._epoch_start(epoch) for epoch in range(4)]
    assert any(end % 7 for end in ends)
    # Groups of seven begin at multiples of seven in every epoch.
    for start, end in pairwise(ends):
        groups: dict[int, list[int]] = {}
        for index in range(start, end):
            groups.setdefault(index // 7, []).append(vision_work(free[index], config))
        runs = sorted(sorted(group) for group in groups.values())
        assert list(chain(*runs)) == sorted(chain(*runs))
    assert free.epoch_packs(3) == make_dataset(processor, config, free.packing).epoch_packs(3)


def vision_work(batch: dict[str, torch.Tensor], config: Config) -> int:
    """Of the linears and of attention, over all frames of a pack."""
    frames = [
        rows * columns
        for name in ("image", "video")
        for count, rows, columns in batch[f"{name}_grid_thw"].tolist()
        for _ in range(count)
    ]
    return sum(12 * patches * config.vision.hidden_size + 2 * patches**2 for patches in frames)


def test_conversations_that_fit_into_no_pack_are_dropped_and_counted(
    processor: Qwen3VLProcessor, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    long, four = make_conversation(100), [{"type": "image", "image": Image.new("RGB", (24, 16))}] * 4
    images = [{"role": "user", "content": four}, CONVERSATIONS[0][1]]
    conversations = [CONVERSATIONS[0], long, CONVERSATIONS[1], long, images, CONVERSATIONS[2]]
    for packing, dropped in (
        (PackingOptions(too_long="drop"), [1, 3]),
        (PackingOptions("first-fit-decreasing", too_long="drop"), [1, 3]),
        (PackingOptions("first-fit-decreasing", max_patches=60, too_long="drop"), [1, 3, 4]),
    ):
        caplog.clear()
        dataset = build(conversations, processor, config, packing=packing)
        assert dataset.selection.dropped == dropped
        for epoch in range(2):
            members = sorted(member for pack in dataset.epoch_packs(epoch) for member in pack)
            assert members == sorted({0, 1, 2, 3, 4, 5} - set(dropped))
        assert dataset.selection.turns.assistant == 6 - len(dropped)
        assert dataset.selection.dropped_report.startswith(
            f"{len(dropped)} of 6 conversations are dropped (first: conversation 1: "
        )
        assert dataset.selection.dropped_report in caplog.text
    with rejects("conversation 4: ", "patches do not fit into a pack of 60", "--long-conversations drop"):
        build([*CONVERSATIONS[:4], images], processor, config, packing=dataclasses.replace(packing, too_long="error"))
    with rejects("expected at least one that fits into a pack; 1 of 1 conversations are dropped"):
        build([long], processor, config, packing=packing)


def test_conversations_that_fit_into_no_pack_are_truncated_or_dropped_and_counted(
    processor: Qwen3VLProcessor, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    images = [{"type": "image", "image": Image.new("RGB", (24, 16))}] * 4
    talk = [*CONVERSATIONS[0], {"role": "user", "content": images}, CONVERSATIONS[1][1]]
    many = [*talk[:2], {"role": "user", "content": " hello" * 100}, talk[1]]
    conversations = [CONVERSATIONS[3], many, make_conversation(100), talk]
    for options, truncated in (
        ({"packing": PackingOptions(too_long="truncate")}, {1: 2}),
        ({"packing": PackingOptions("first-fit-decreasing", max_patches=60, too_long="truncate")}, {1: 2, 3: 2}),
    ):
        caplog.clear()
        dataset = build(conversations, processor, config, **options)
        assert dataset.selection.truncated == truncated
        assert dataset.selection.dropped == [2]
        assert dataset.selection.truncated_report in caplog.text
        assert dataset.selection.truncated_report == (
            f"{len(truncated)} of 4 conversations are truncated (first: conversation 1: 2 messages are left)"
        )
        expected = {
            index: encode_conversation(conversations[index][: truncated.get(index)], processor) for index in (0, 1, 3)
        }
        assert dataset.selection.turns.assistant == 5 - len(truncated)
        packs = dataset.epoch_packs(0)
        assert sorted(member for pack in packs for member in pack) == [0, 1, 3]
        for item, members in enumerate(packs):
            tokens = torch.cat([expected[member].input_ids for member in members])
            assert torch.equal(dataset[item]["tokens"][: len(tokens)], tokens)
            assert len(dataset[item]["image_grid_thw"]) == sum(len(expected[m].image_grid_thw) for m in members)
    with rejects("expected at least one that fits into a pack"):  # as padding counts
        build(conversations[1:2], processor, config, multiple_of=SEQ_LENGTH + 1, **options)


@pytest.mark.parametrize("multiple_of", [1, 8])
def test_a_conversation_may_fill_a_pack(processor: Qwen3VLProcessor, config: Config, multiple_of: int) -> None:
    tokens = len(encode_conversation(CONVERSATIONS[0], processor).input_ids)
    capacity = -(-tokens // multiple_of) * multiple_of
    options: dict[str, Any] = {"num_samples": 1, "multiple_of": multiple_of}
    pack = PackedConversations([CONVERSATIONS[0]], processor, config, seq_length=capacity, **options)[0]
    assert pack["segment_lengths"].tolist() == [tokens]
    with rejects(f"{tokens} tokens do not fit into a pack of {capacity - 1}"):
        PackedConversations([CONVERSATIONS[0]], processor, config, seq_length=capacity - 1, **options)


def test_invalid_packing_options_are_rejected_by_name() -> None:
    for name, value in (("max_patches", 1), ("window", 1), ("neighbors", 2)):
        with rejects(f"{name}: expected the packing first-fit-decreasing, found best-fit"):
            PackingOptions(**{name: value})
    with rejects("method: expected one of best-fit, first-fit-decreasing, found bfd"):
        PackingOptions("bfd")
    with rejects("too_long: expected one of error, drop, truncate, found cut"):
        PackingOptions(too_long="cut")
    with rejects("neighbors: expected at least 1, found 0"):
        PackingOptions(neighbors=0)


def build(conversations: list, processor: Qwen3VLProcessor, config: Config, **options: Any) -> PackedConversations:
    return PackedConversations(conversations, processor, config, seq_length=SEQ_LENGTH, num_samples=4, **options)


def test_bad_conversations_are_named(processor: Qwen3VLProcessor, config: Config) -> None:
    good = CONVERSATIONS[0]
    with rejects("tokens do not fit into a pack of 96", start="conversation 1: "):
        build([good, make_conversation(100)], processor, config)
    with rejects(start="conversation 1: no supervised token"):
        build([good, good[:1]], processor, config)
    with rejects("at least one"):
        build([], processor, config)


def test_errors_of_conversations_from_a_file_name_file_line_and_split(
    processor: Qwen3VLProcessor, config: Config, tmp_path: Path
) -> None:
    good = json.dumps({"messages": CONVERSATIONS[0]})
    lost = [{"type": "text", "text": "x"}, {"type": "image", "image": "lost.png"}]
    for messages, problem in (
        ([{"role": "user", "content": " hello" * 100}, CONVERSATIONS[0][1]], "tokens do not fit into a pack of 96"),
        (CONVERSATIONS[0][:1], "no supervised token"),
        ([{"role": "user", "content": lost}], "message 0 (user), part 1: image: no file"),
        ([{"role": "user", "content": "<|im_end|>"}], "message 0 (user): the text contains the special tokens"),
    ):
        path = tmp_path / "valid.jsonl"
        path.write_text(f"\ufeff{good}\n\n{json.dumps({'messages': messages})}\n", encoding="utf-8")
        with rejects(problem, start=f"validation data {path}, line 3: "):
            build(read_conversations(path, split="validation"), processor, config)
        with rejects(problem, start=f"{path}, line 3: "):
            build(list(reversed(read_conversations(path))), processor, config)


def test_every_line_of_a_file_is_checked_when_the_dataset_is_created(
    processor: Qwen3VLProcessor, config: Config, tmp_path: Path
) -> None:
    path, good = tmp_path / "train.jsonl", json.dumps({"messages": CONVERSATIONS[0]})
    for bad, problem in (
        ("{", "one JSON object on the line, found '{'"),
        (json.dumps({"messages": CONVERSATIONS[0], "images": []}), "the line: unknown key 'images'"),
    ):
        path.write_text(f"{good}\n{good}\n{bad}\n")
        conversations = read_conversations(path, split="train")
        with rejects(problem, start=f"train data {path}, line 3: ") as error:
            build(conversations, processor, config)
        assert str(error.value).count("line 3") == 1


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_an_epoch_has_the_conversations_of_a_source_as_often_as_its_weight_says(
    processor: Qwen3VLProcessor, config: Config, tmp_path: Path, packing: PackingOptions
) -> None:
    weights, counts = {"half": 0.5, "double": 2, "one": 1}, {"half": 6, "double": 4, "one": 5}
    for name, count in counts.items():
        lines = [
            json.dumps({"messages": [{"role": "user", "content": " hello" * (3 + n)}, CONVERSATIONS[0][1]]})
            for n in range(count)
        ]
        if name == "one":  # and one that fits into no pack
            lines.insert(1, lines[0].replace("hello", "hello " * 100))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    meta = [{"path": f"{name}.jsonl", "weight": weight} for name, weight in weights.items()]
    (tmp_path / "meta.yaml").write_text(json.dumps({"train": meta}))
    conversations = open_data(tmp_path / "meta.yaml")
    assert conversations is not None
    packing = dataclasses.replace(packing, too_long="drop")
    dataset = build(conversations, processor, config, packing=packing)
    assert dataset.selection.dropped == [11]
    epochs = [Counter(chain.from_iterable(dataset.epoch_packs(epoch))) for epoch in range(4)]
    for epoch, taken in enumerate(epochs):
        assert [taken[member] for member in range(6, 16)] == [2] * 4 + [1, 0, 1, 1, 1, 1]
        halves = taken + epochs[epoch ^ 1]
        assert [halves[member] for member in range(6)] == [1] * 6
        assert sum(taken.values()) == 3 + 8 + 5
    with_text = dataset[0]["tokens"]
    again = build(conversations, processor, config, packing=packing)
    assert [again.epoch_packs(epoch) for epoch in (3, 1)] == [dataset.epoch_packs(epoch) for epoch in (3, 1)]
    assert torch.equal(again[0]["tokens"], with_text)


def test_neighboring_packs_of_weighted_sources_have_like_vision_work(
    processor: Qwen3VLProcessor, config: Config, tmp_path: Path
) -> None:
    for name in ("text", "image"):
        lines = []
        for n in range(9 if name == "text" else 8):
            parts = [{"type": "text", "text": " hello" * (40 if name == "text" else 30)}]
            if name == "image":
                Image.new("RGB", (8, 8 * (1 + n))).save(tmp_path / f"{n}.png")
                parts.append({"type": "image", "image": f"{n}.png"})
            lines.append(json.dumps({"messages": [{"role": "user", "content": parts}, CONVERSATIONS[0][1]]}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "meta.yaml").write_text("train: [{path: text.jsonl, weight: 3}, {path: image.jsonl, weight: 2}]")
    conversations = open_data(tmp_path / "meta.yaml")
    assert conversations is not None
    packing = PackingOptions("first-fit-decreasing", neighbors=2)
    dataset = build(conversations, processor, config, packing=packing)
    loads = [sum(dataset.work[member] for member in pack) for pack in dataset.epoch_packs(0)]
    assert len(loads) % 2 == 0
    assert len(set(loads)) > 4
    in_order = sorted(loads)
    pairs = zip(in_order[::2], in_order[1::2], strict=True)
    assert sorted(tuple(sorted(pair)) for pair in zip(loads[::2], loads[1::2], strict=True)) == sorted(pairs)


def thinking(processor: Qwen3VLProcessor) -> Qwen3VLProcessor:
    """A processor whose template drops reasoning."""
    cut = CHAT_TEMPLATE.replace("message.content }}", "message.content.split('</think>')[-1] }}")
    return Qwen3VLProcessor(
        processor.image_processor, processor.tokenizer, processor.video_processor, chat_template=cut
    )


def test_excluded_turns_are_counted_and_logged(
    processor: Qwen3VLProcessor,
    config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def talk(*texts: str) -> str:
        roles = ("user", "assistant")
        return json.dumps(
            {"messages": [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]}
        )

    path = tmp_path / "train.jsonl"
    path.write_text(
        "\n".join([talk("q", "a"), talk("q", "a", "r", "<think></think>b"), talk("q", "</think>c", "r", "d")])
    )
    dataset = build(read_conversations(path), thinking(processor), config)
    turns = dataset.selection.turns
    assert (turns.excluded, turns.assistant) == (2, 5)
    [report] = turns.reports
    assert report.startswith("2 of 5 assistant turns are excluded from the loss")
    assert f"{path}, line 2, message 3: expected '<think></think>b', found 'b'" in report
    assert [record.getMessage() for record in caplog.records] == [report]
    caplog.clear()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, logged in ((0, 1), (1, 0)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        caplog.clear()
        build(read_conversations(path), thinking(processor), config)
        assert len(caplog.records) == logged
    caplog.clear()
    whole = build(read_conversations(path), processor, config).selection
    assert (whole.turns.excluded, whole.reports, caplog.records) == (0, [], [])


def test_an_image_whose_size_changed_after_creation_is_rejected(
    processor: Qwen3VLProcessor, config: Config, tmp_path: Path
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    parts = [{"type": "image", "image": str(tmp_path / "a.png")}]
    dataset = build([[{"role": "user", "content": parts}, CONVERSATIONS[0][1]]], processor, config)
    Image.new("RGB", (32, 16)).save(tmp_path / "a.png")
    with rejects("when it was measured", start="conversation 0: "):
        dataset[0]


def test_a_processor_of_another_checkpoint_is_rejected(processor: Qwen3VLProcessor, config: Config) -> None:
    vision = dataclasses.replace(config.vision, patch_size=16)
    text = dataclasses.replace(config.text, vocab_size=100)
    for other, found, expected in (
        (dataclasses.replace(config, image_token_id=99), f"image token id {config.image_token_id}", "has 99"),
        (dataclasses.replace(config, vision=vision), "image patch size 4", "has 16"),
        (dataclasses.replace(config, text=text), f"{len(processor.tokenizer)} tokens", "a vocabulary of 100"),
    ):
        with rejects(found, expected):
            build(CONVERSATIONS[:1], processor, other)


@pytest.mark.parametrize("source", ["https://example.org/a.png", "data:image/png;base64,AAAA", "file:///a.png"])
def test_a_url_in_a_file_is_rejected_with_the_line(
    processor: Qwen3VLProcessor, config: Config, tmp_path: Path, source: str
) -> None:
    for part in ({"type": "image", "image": source}, {"type": "video", "video": [source, source], "fps": 2}):
        messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]
        (tmp_path / "train.jsonl").write_text(json.dumps({"messages": messages}))
        with rejects("train.jsonl, line 1: message 0 (user), part 0: ", "is a URL"):
            build(read_conversations(tmp_path / "train.jsonl"), processor, config)


def test_the_pixel_limit_is_an_option(processor: Qwen3VLProcessor, config: Config, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    part = {"type": "image", "image": "a.png"}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": messages}))
    conversations = read_conversations(tmp_path / "train.jsonl")
    assert len(build(conversations, processor, config, media=MediaOptions(1200)).lengths) == 1
    with rejects("line 1: message 0 (user), part 0: ", "a.png' is too large", "1199 pixels"):
        build(conversations, processor, config, media=MediaOptions(1199))


def test_the_tools_of_a_conversation_are_encoded(processor: Qwen3VLProcessor, config: Config) -> None:
    template = "{%- if tools %}<|im_start|>system\n{{ tools[0] | tojson }}<|im_end|>\n{% endif %}" + CHAT_TEMPLATE
    with_tools = Qwen3VLProcessor(
        processor.image_processor, processor.tokenizer, processor.video_processor, chat_template=template
    )
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    conversations = [FileConversation(talk, "a, line 1", tools=[{"name": "f"}]), FileConversation(talk, "a, line 2")]
    data = PackedConversations(conversations, with_tools, config, seq_length=SEQ_LENGTH, num_samples=1)
    texts = sorted(processor.decode(data[0]["tokens"]).split("<|im_start|>system\n"))
    assert len(texts) == 2
    assert any(text.startswith('{"name": "f"}<|im_end|>\n<|im_start|>user') for text in texts)
    with rejects("a, line 1: tools: the chat template does not render them"):
        PackedConversations(conversations, processor, config, seq_length=SEQ_LENGTH, num_samples=1)


def test_turns_that_are_not_learned_are_counted(
    processor: Qwen3VLProcessor, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    talk = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    conversations = [talk, [*talk, {"role": "assistant", "content": "b", "train": False}], talk[:2]]
    data = PackedConversations(
        conversations, processor, config, seq_length=SEQ_LENGTH, num_samples=1, labels=LabelOptions(turns="last")
    )
    turns = data.selection.turns
    assert (turns.skipped, turns.assistant, turns.excluded) == (3, 6, 0)
    [report] = turns.reports
    assert report.startswith("3 of 6 assistant turns are not learned")
    assert [record.message for record in caplog.records] == [report]
    caplog.clear()
    options = {"seq_length": SEQ_LENGTH, "num_samples": 1, "labels": LabelOptions(turns="last"), "log": False}
    assert PackedConversations(conversations, processor, config, **options).selection.turns == turns
    assert not caplog.records
    assert int((data[0]["labels"] >= 0).sum()) == 3 * len(processor.tokenizer.encode("a<|im_end|>"))


@pytest.mark.parametrize("weight", [None, 0.5])
def test_packs_without_decoding_differ_only_in_the_patches(
    processor: Qwen3VLProcessor, config: Config, monkeypatch: pytest.MonkeyPatch, weight: float | None
) -> None:
    conversations = copy.deepcopy(CONVERSATIONS)
    if weight:
        conversations[5][1]["weight"] = weight
    options = {"seq_length": SEQ_LENGTH, "num_samples": 20}
    decoded = [*PackedConversations(conversations, processor, config, **options)]
    for name in ("load_image", "load_video"):
        monkeypatch.setattr(published, name, None)
    measured = [*PackedConversations(conversations, processor, config, **options, decode_media=False)]
    assert sum("loss_weights" in pack for pack in decoded) == (2 if weight else 0)
    for with_patches, without in zip(decoded, measured, strict=True):
        assert all(len(without.pop(key)) == 0 for key in ("pixel_values", "pixel_values_videos"))
        rest = {key: x for key, x in with_patches.items() if not key.startswith("pixel_values")}
        assert equal(without, rest)
