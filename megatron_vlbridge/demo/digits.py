"""Conversations about real handwritten digits: scikit-learn's `load_digits`, 1,797 scans of 8 x 8 values from 0 to 16.

The scans ship inside scikit-learn, so a small model can learn to read images on a machine without a network.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from megatron_vlbridge.data.dataset import read_conversations
from megatron_vlbridge.data.media import Conversation, load_image
from megatron_vlbridge.errors import VLBridgeError

SCAN_SIZE = 8
SCAN_MAX = 16
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# What a base of adapters is trained on.
BASE_DIGITS = range(5)
ASK_ONE = "Which digit is this?"
ASK_TWO = "Which digits are these?"
ASK_VIDEO = "Which digits does it show?"
FPS = 2
FRAMES_OF_A_DIGIT = 2
GRAY = (128, 128, 128)


@dataclass(frozen=True, eq=False)
class Scan:
    """One handwritten digit: its row in `load_digits`, its value 0..9, and its image (RGB, square)."""

    index: int
    digit: int
    image: Image.Image

    @property
    def word(self) -> str:
        """The digit as the model shall say it: `"seven"`."""
        return WORDS[self.digit]


def load_scans(size: int = 32) -> tuple[Scan, ...]:
    """All 1,797 scans in scikit-learn's order, as 8-bit RGB images of `size` x `size` pixels, white ink on black.

    Each scan value becomes one square block of equal pixels, so the image holds the scan's values and nothing else.

    Raises VLBridgeError: `size` is not a positive multiple of 8.

    Example: `load_scans(32)[0].word` is `zero`.
    """
    if size <= 0 or size % SCAN_SIZE:
        raise VLBridgeError(
            f"digit images: size {size} is not a positive multiple of {SCAN_SIZE} (each scan is "
            f"{SCAN_SIZE} x {SCAN_SIZE} values, enlarged to equal blocks); choose e.g. {4 * SCAN_SIZE}"
        )
    values, digits = load_digits(return_X_y=True)
    grays = np.rint(values.reshape(-1, SCAN_SIZE, SCAN_SIZE) * (255 / SCAN_MAX)).astype(np.uint8)
    block = size // SCAN_SIZE
    images = grays.repeat(block, axis=1).repeat(block, axis=2)
    return tuple(
        Scan(index, int(digit), Image.fromarray(image).convert("RGB"))
        for index, (digit, image) in enumerate(zip(digits, images, strict=True))
    )


def split_scans(scans: Sequence[Scan], held_out: int = 297, seed: int = 0) -> tuple[tuple[Scan, ...], tuple[Scan, ...]]:
    """Divides the scans into (train, held out), both in their original order, each digit in the same share in both.

    Raises VLBridgeError: fewer than one scan of each digit would be in one of the two parts.

    Example: `train, held_out = split_scans(load_scans())` gives 1,500 and 297.
    """
    kinds = len({scan.digit for scan in scans})
    if not kinds <= held_out <= len(scans) - kinds:
        raise VLBridgeError(
            f"digit split: {held_out} held-out scans of {len(scans)}; expected between {kinds} and "
            f"{len(scans) - kinds}, so that each of the {kinds} digits is in both parts"
        )
    rows = np.arange(len(scans))
    train, rest = train_test_split(rows, test_size=held_out, random_state=seed, stratify=[scan.digit for scan in scans])
    return tuple(scans[row] for row in sorted(train)), tuple(scans[row] for row in sorted(rest))


def conversation_about(*scans: Scan) -> Conversation:
    """A conversation about one image or two, in the Hugging Face messages format.

    Raises VLBridgeError: neither one nor two scans are given.
    """
    if len(scans) not in (1, 2):
        raise VLBridgeError(f"digit conversation: {len(scans)} images given; expected 1 or 2")
    images = [{"type": "image", "image": scan.image} for scan in scans]
    question = {"type": "text", "text": ASK_ONE if len(scans) == 1 else ASK_TWO}
    answer = {"type": "text", "text": " ".join(scan.word for scan in scans)}
    return [{"role": "user", "content": [*images, question]}, {"role": "assistant", "content": [answer]}]


def video_of(first: Scan, second: Scan) -> Conversation:
    """A conversation about a video, which shows one digit for a second and then the other.

    Example: `answer(video_of(*load_scans()[:2]))` is `zero one`.
    """
    frames = [scan.image for scan in (first, second) for _ in range(FRAMES_OF_A_DIGIT)]
    video = {"type": "video", "video": frames, "fps": FPS}
    text = {"type": "text", "text": f"{first.word} {second.word}"}
    return [
        {"role": "user", "content": [video, {"type": "text", "text": ASK_VIDEO}]},
        {"role": "assistant", "content": [text]},
    ]


def video_conversations(scans: Sequence[Scan], count: int, seed: int = 0) -> list[Conversation]:
    """Conversations about `count` videos, each of two different scans. The same arguments give the same ones.

    Raises VLBridgeError: there are fewer than two scans.
    """
    return [video_of(*(scans[row] for row in rows)) for rows in _pairs(scans, count, (seed, 1))]


def conversations(scans: Sequence[Scan], pairs: int, seed: int = 0) -> list[Conversation]:
    """One conversation about each scan, and `pairs` about two different ones each, shuffled together.

    The same arguments give the same conversations in the same order.

    Raises VLBridgeError: pairs are asked for and there are fewer than two scans.

    Example: `len(conversations(train, pairs=500))` is 2,000 for the 1,500 scans of `split_scans`.
    """
    random = np.random.default_rng(seed)
    drawn = _pairs(scans, pairs, random)
    ordered = [conversation_about(scan) for scan in scans] + [
        conversation_about(*(scans[row] for row in rows)) for rows in drawn
    ]
    return [ordered[place] for place in random.permutation(len(ordered))]


def _pairs(scans: Sequence[Scan], count: int, seed: Any) -> list[NDArray[np.int64]]:
    if count and len(scans) < 2:
        raise VLBridgeError(f"digit conversations: {count} pairs asked for, but only {len(scans)} scans given")
    random = np.random.default_rng(seed)
    return [random.choice(len(scans), size=2, replace=False) for _ in range(count)]


def question(conversation: Conversation) -> Conversation:
    """The conversation without its last message, the assistant's answer: what a model is asked to continue."""
    return conversation[:-1]


def answer(conversation: Conversation) -> str:
    """The text of the conversation's last message: what a model is expected to say."""
    return "".join(part["text"] for part in conversation[-1]["content"])


def is_known_to_base(conversation: Conversation) -> bool:
    """Whether all digits of a conversation are among those that a base of adapters is trained on."""
    return all(WORDS.index(word) in BASE_DIGITS for word in answer(conversation).split())


def images_of(conversation: Conversation) -> list[Image.Image]:
    """The images of a conversation, in order."""
    return [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]


def videos_of(conversation: Conversation) -> list[dict[str, Any]]:
    """The videos of a conversation, in order, as content parts."""
    return [part for message in conversation for part in message["content"] if part["type"] == "video"]


def blank(conversation: Conversation) -> Conversation:
    """The same conversation with each image and frame replaced by a gray one of the same size.

    A model that still answers right has not read its images. The conversation given is left as it is.
    """
    return _replace_images(conversation, lambda image: Image.new("RGB", image.size, GRAY))


def write_conversations(conversations: Sequence[Conversation], path: Path) -> None:
    """Write conversations with PIL images as JSON lines that `read_conversations` reads.

    Each image is written once, as PNG, in the folder of the name of `path` without its suffix.
    """
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    names: dict[int, str] = {}

    def write(image: Image.Image) -> str:
        if id(image) not in names:
            names[id(image)] = f"{folder.name}/{len(names):04d}.png"
            image.save(path.parent / names[id(image)])
        return names[id(image)]

    with path.open("w", encoding="utf-8") as file:
        for conversation in conversations:
            file.write(json.dumps({"messages": _replace_images(conversation, write)}) + "\n")


def load_conversations(path: Path) -> list[Conversation]:
    """The conversations of a JSON lines file, with PIL images in place of paths."""
    conversations = read_conversations(path)
    return [_replace_images(one, lambda name: load_image({"image": name})) for one in conversations]


def _replace_images(conversation: Conversation, new: Callable[[Any], object]) -> Conversation:
    def replaced(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "image":
            return {**part, "image": new(part["image"])}
        return {**part, "video": [new(frame) for frame in part["video"]]} if part["type"] == "video" else part

    return [{**message, "content": [replaced(part) for part in message["content"]]} for message in conversation]
