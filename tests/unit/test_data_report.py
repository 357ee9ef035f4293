"""The report on conversations: counts by hand, failures with their place, and the supervised tokens marked."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen3VLProcessor

from megatron_vlbridge.data.chat import encode_conversation
from megatron_vlbridge.data.conversations import read_conversations
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.lengths.measure import Measure
from megatron_vlbridge.data.lengths.turn_counts import TurnCounts
from megatron_vlbridge.data.report.packing import pack_report
from megatron_vlbridge.data.report.page import histogram, page
from megatron_vlbridge.data.report.summary import Summary, summarize, supervised_pieces
from megatron_vlbridge.demo.tiny_processor import build_processor
from tests.video_writer import moving, write_video


@pytest.fixture(scope="module")
def processor() -> Qwen3VLProcessor:
    return build_processor(["hello", "seven"], patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)


def write(folder: Path, name: str) -> Path:
    """Two good conversations, one whose image is missing, and one good one without media."""
    Image.fromarray(np.full((16, 24, 3), 200, np.uint8)).save(folder / "a.png")
    image, missing = ({"type": "image", "image": file} for file in ("a.png", "none.png"))
    frames = {"type": "video", "video": ["a.png"] * 4, "fps": 2}
    lines = [
        ([image, {"type": "text", "text": "hello <script>"}], "seven"),
        ([image, frames], "seven & seven"),
        ([missing], "seven"),
        ("hello", "seven"),
    ]
    with (folder / name).open("w") as file:
        for question, answer in lines:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder / name


@pytest.fixture(scope="module")
def summary(processor: Qwen3VLProcessor, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    path = write(tmp_path_factory.mktemp("data"), "train.jsonl")
    return summarize(
        "train",
        read_conversations(path),
        lambda conversation: encode_conversation(conversation, processor),
        processor,
        show=4,
        media=MediaOptions(),
    )


def test_counts_are_those_of_the_conversations(summary: Summary) -> None:
    # An image of 24 x 16 pixels is 6 x 4 patches, a video of 4 frames twice that.
    assert summary.patches == [24, 24 + 48, 0]
    assert (summary.images, summary.videos) == (2, 1)
    assert summary.turns == TurnCounts(assistant=3)
    assert summary.tokens.total() == sum(summary.lengths)
    assert set(summary.tokens) == {"user", "assistant"}
    # The answers and their end: seven, "seven & seven" byte by byte where the vocabulary has no word.
    assert summary.supervised["user"] == 0
    assert summary.supervised.total() == summary.supervised["assistant"] > 0


def test_a_failure_has_file_and_line(summary: Summary) -> None:
    (failure,) = summary.failures
    assert "train.jsonl, line 3" in failure
    assert "none.png" in failure
    assert failure.count("line 3") == 1


def test_pieces_are_the_supervised_text(summary: Summary, processor: Qwen3VLProcessor) -> None:
    assert [[piece.text for piece in one.pieces if piece.supervised] for one in summary.shown] == [
        ["seven<|im_end|>"],
        ["seven & seven<|im_end|>"],
        ["seven<|im_end|>"],
    ]
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "seven"}]
    sample = encode_conversation(messages, processor)
    text = "".join(piece.text for piece in supervised_pieces(sample, processor))
    assert text == processor.tokenizer.decode(sample.input_ids)


def test_media_that_are_not_shown_are_counted(processor: Qwen3VLProcessor, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    video = write_video(tmp_path / "a.mp4", moving(8), fps=4)
    parts = [{"type": "image", "image": str(tmp_path / "a.png")}] * 10 + [{"type": "video", "video": str(video)}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "seven"}]
    found = summarize(
        "train", [messages], lambda one: encode_conversation(one, processor), processor, show=1, media=MediaOptions()
    )
    assert [(len(one.images), one.hidden) for one in found.shown] == [(8, 3)]
    assert "and 3 more images or video files" in Texts(page([found])).text


def test_roles_are_not_taken_for_answers(processor: Qwen3VLProcessor) -> None:
    messages = [{"role": role, "content": "hello"} for role in ("system", "user", "assistant")]
    found = summarize(
        "train", [messages], lambda one: encode_conversation(one, processor), processor, media=MediaOptions()
    )
    assert found.turns == TurnCounts(assistant=1)


def test_characters_of_several_tokens_are_shown(processor: Qwen3VLProcessor) -> None:
    messages = [{"role": "user", "content": "\u00df\u732b"}, {"role": "assistant", "content": "\u732b\U0001f600"}]
    sample = encode_conversation(messages, processor)
    context, learned, rest = supervised_pieces(sample, processor)
    assert "\u00df\u732b" in context.text
    assert learned.text == "\u732b\U0001f600<|im_end|>"
    assert "\ufffd" not in context.text + learned.text + rest.text


def test_turns_that_are_not_learned_are_counted_with_place_and_reason(
    processor: Qwen3VLProcessor, tmp_path: Path
) -> None:
    def line(*texts: str, **keys: object) -> str:
        messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
        messages[1] |= keys
        return json.dumps({"messages": messages})

    path = tmp_path / "train.jsonl"
    lines = [line("q", "a"), line("q", "a", "r", "<think></think>b"), line("q", "a", "r", "c", train=False)]
    path.write_text("\n".join(lines))
    thinking = build_processor(["a"], patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    thinking.chat_template = thinking.chat_template.replace(
        "message.content }}", "message.content.split('</think>')[-1] }}"
    )
    found = summarize(
        "train",
        read_conversations(path),
        lambda conversation: encode_conversation(conversation, thinking),
        thinking,
        media=MediaOptions(),
    )
    place = f"{path}, line 2, message 3: expected '<think></think>b', found 'b'"
    assert (found.turns.assistant, found.turns.excluded, found.turns.skipped) == (5, 1, 1)
    assert [text[: len(place)] for text in found.excluded] == [place]
    assert Measure(thinking, 32)(read_conversations(path), range(3)).count_turns() == found.turns
    text = Texts(page([found])).text
    assert (
        f"1 of 5 assistant turns are excluded from the loss, as their tokens differ from the message (first: {place}"
        in text
    )
    assert "1 of 5 assistant turns are not learned" in text
    assert text.count(place) == 2


def test_placeholders_in_a_row_are_counted(summary: Summary) -> None:
    text = "".join(piece.text for piece in summary.shown[0].pieces)
    assert text.count("<|image_pad|> x 6 ") == 1
    assert text.count("<|image_pad|>") == 1


def test_thumbnails_are_the_images(summary: Summary) -> None:
    assert [len(one.images) for one in summary.shown] == [1, 5, 0]
    data = base64.b64decode(summary.shown[0].images[0].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).size == (24, 16)


class Texts(HTMLParser):
    """The texts of a page, those of <mark> apart, and its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.marked: list[str] = []
        self.text = ""
        self.elements: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.elements.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.elements[-1:] == ["mark"]:
            self.marked.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(f"/{tag}")


def test_the_page_marks_what_is_learned_and_escapes_texts(summary: Summary) -> None:
    found = Texts(page([summary]))
    assert found.marked == ["seven<|im_end|>", "seven & seven<|im_end|>", "seven<|im_end|>"]
    assert "script" not in found.elements
    assert "hello <script>" in found.text
    assert summary.failures[0] in found.text
    assert found.elements.count("img") == 6
    assert found.elements.count("svg") == 2


def test_every_value_is_in_one_bar() -> None:
    values = [int(value) for value in np.random.default_rng(0).lognormal(5, 1, 500)]
    drawing = histogram(values, "tokens")
    counts = [int(part.partition("</title>")[0].rpartition(": ")[2]) for part in drawing.split("<title>")[1:]]
    assert sum(counts) == 500
    assert len(counts) == 40
    assert histogram([7], "one").count("<rect") == 1


def test_a_pack_report_counts_room_and_work() -> None:
    """Three packs of 10 tokens by hand: lengths 3, 4, 9 and 5, each rounded up to an even number."""
    report = pack_report(
        [[0, 1], [2], [3]],
        [3, 4, 9, 5],
        [8, 0, 2, 4],
        [6, 0, 2, 100],
        seq_length=10,
        multiple_of=2,
        data_parallel=2,
    )
    assert (report.packs, report.conversations, report.tokens) == (3, 4, 21)
    assert (report.fill, report.padding, report.empty) == (21 / 30, 3 / 30, 6 / 30)
    assert report.patches == (12, 2)
    # The one whole step has the work 6 and 2.
    assert report.work_imbalance == 1.5
    assert pack_report([[0]], [3], [0], [0], seq_length=4).work_imbalance == 1
    assert report.as_json()["patches"] == (12, 2)
