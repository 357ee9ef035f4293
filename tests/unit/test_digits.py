from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from megatron_vlbridge.demo.digits import (
    Conversation,
    Scan,
    answer,
    blank,
    conversation_about,
    conversations,
    is_known_to_base,
    load_scans,
    question,
    split_scans,
    video_conversations,
    videos_of,
)
from megatron_vlbridge.demo.drawing import draw_answer_sheet, draw_loss_curve
from megatron_vlbridge.errors import VLBridgeError

WORD_OF = dict(enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]))


@pytest.fixture(scope="module")
def scans() -> tuple[Scan, ...]:
    return load_scans(32)


def images_of(conversation: Conversation) -> list[Image.Image]:
    return [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]


def texts_of(conversation: Conversation) -> list[str]:
    return [part["text"] for message in conversation for part in message["content"] if part["type"] == "text"]


@pytest.mark.parametrize("size", [8, 32, 64])
def test_a_image_is_its_scan_enlarged(size: int) -> None:
    bunch = load_digits()
    scans = load_scans(size)
    assert len(scans) == 1797
    for row in (0, 1, 900, 1796):
        pixels = np.asarray(scans[row].image)
        assert pixels.shape == (size, size, 3)
        assert pixels.dtype == np.uint8
        for y in range(size):
            for x in range(size):
                gray = round(bunch.images[row][y * 8 // size][x * 8 // size] * 255 / 16)
                assert pixels[y, x].tolist() == [gray] * 3


def test_scans_carry_their_row_and_digit(scans: tuple[Scan, ...]) -> None:
    targets = load_digits().target
    assert [scan.index for scan in scans] == list(range(1797))
    assert [scan.digit for scan in scans] == targets.tolist()
    assert all(scan.word == WORD_OF[scan.digit] for scan in scans)


@pytest.mark.parametrize("size", [0, -8, 30])
def test_a_size_that_would_distort_the_scan_is_refused(size: int) -> None:
    with pytest.raises(VLBridgeError, match=f"size {size} is not a positive multiple of 8"):
        load_scans(size)


def test_the_split_is_disjoint_complete_and_stratified(scans: tuple[Scan, ...]) -> None:
    train, held_out = split_scans(scans)
    assert (len(train), len(held_out)) == (1500, 297)
    rows = [scan.index for scan in train] + [scan.index for scan in held_out]
    assert sorted(rows) == list(range(1797))
    for digit in range(10):
        share = sum(scan.digit == digit for scan in held_out) / sum(scan.digit == digit for scan in scans)
        assert abs(share - 297 / 1797) < 1 / 174  # within one scan of the rarest digit


def test_the_split_depends_on_the_seed_alone(scans: tuple[Scan, ...]) -> None:
    def held_out_rows(seed: int) -> list[int]:
        return [scan.index for scan in split_scans(scans, seed=seed)[1]]

    assert held_out_rows(3) == held_out_rows(3)
    assert held_out_rows(3) != held_out_rows(4)


@pytest.mark.parametrize("held_out", [0, 9, 1788, 1797])
def test_a_split_that_misses_a_digit_is_refused(scans: tuple[Scan, ...], held_out: int) -> None:
    with pytest.raises(VLBridgeError, match=r"expected between 10 and 1787"):
        split_scans(scans, held_out)


def test_a_conversation_asks_about_its_images_in_order(scans: tuple[Scan, ...]) -> None:
    first, second = scans[7], scans[2]
    one, two = conversation_about(first), conversation_about(first, second)
    assert [message["role"] for message in one] == ["user", "assistant"]
    assert texts_of(one) == ["Which digit is this?", "seven"]
    assert texts_of(two) == ["Which digits are these?", "seven two"]
    assert images_of(two) == [first.image, second.image]
    assert answer(two) == "seven two"
    assert texts_of(question(two)) == ["Which digits are these?"]
    assert images_of(question(two)) == images_of(two)


@pytest.mark.parametrize("count", [0, 3])
def test_a_conversation_has_one_image_or_two(scans: tuple[Scan, ...], count: int) -> None:
    with pytest.raises(VLBridgeError, match=f"{count} images given; expected 1 or 2"):
        conversation_about(*scans[:count])


def test_every_scan_is_asked_about_once_alone_and_pairs_are_of_different_scans(scans: tuple[Scan, ...]) -> None:
    made = conversations(scans[:50], pairs=20, seed=1)
    row_of = {id(scan.image): scan.index for scan in scans}
    rows = [[row_of[id(image)] for image in images_of(conversation)] for conversation in made]
    assert sorted(row[0] for row in rows if len(row) == 1) == list(range(50))
    pairs = [row for row in rows if len(row) == 2]
    assert len(pairs) == 20
    assert all(a != b and a < 50 and b < 50 for a, b in pairs)
    for conversation, row in zip(made, rows, strict=True):
        assert answer(conversation) == " ".join(WORD_OF[scans[index].digit] for index in row)
    assert [len(row) for row in rows] != sorted(len(row) for row in rows), "singles and pairs are not mixed"


def test_conversations_depend_on_the_seed_alone(scans: tuple[Scan, ...]) -> None:
    assert conversations(scans[:40], 10, seed=5) == conversations(scans[:40], 10, seed=5)
    assert conversations(scans[:40], 10, seed=5) != conversations(scans[:40], 10, seed=6)


def test_pairs_of_a_single_scan_are_refused(scans: tuple[Scan, ...]) -> None:
    with pytest.raises(VLBridgeError, match="only 1 scans given"):
        conversations(scans[:1], pairs=1)


def test_a_video_shows_one_digit_after_the_other(scans: tuple[Scan, ...]) -> None:
    made = video_conversations(scans[:20], 30, seed=3)
    assert made == video_conversations(scans[:20], 30, seed=3)
    row_of = {id(scan.image): scan for scan in scans}
    for conversation in made:
        (video,) = videos_of(conversation)
        shown = [row_of[id(frame)] for frame in video["video"]]
        assert len(shown) == 4
        assert shown[0] is shown[1]
        assert shown[2] is shown[3]
        assert shown[0] is not shown[2]
        assert answer(conversation) == f"{shown[0].word} {shown[2].word}"
        (blanked,) = videos_of(blank(conversation))
        assert {frame.tobytes() for frame in blanked["video"]} == {Image.new("RGB", (32, 32), (128,) * 3).tobytes()}
    assert len({answer(conversation) for conversation in made}) > 10
    with pytest.raises(VLBridgeError, match="1 pairs asked for, but only 1 scans given"):
        video_conversations(scans[:1], 1)


def test_a_base_knows_conversations_whose_digits_are_all_below_five(scans: tuple[Scan, ...]) -> None:
    one_of = {scan.digit: scan for scan in reversed(scans)}
    assert [digit for digit in range(10) if is_known_to_base(conversation_about(one_of[digit]))] == [0, 1, 2, 3, 4]
    assert is_known_to_base(conversation_about(one_of[4], one_of[0]))
    assert not is_known_to_base(conversation_about(one_of[4], one_of[5]))


def test_blanked_images_tell_nothing_and_the_original_is_kept(scans: tuple[Scan, ...]) -> None:
    seven, two = conversation_about(scans[7], scans[1]), conversation_about(scans[2], scans[3])
    before = [image.tobytes() for image in images_of(seven)]
    blanked = [image for conversation in (seven, two) for image in images_of(blank(conversation))]
    assert len({image.tobytes() for image in blanked}) == 1
    assert all(image.size == (32, 32) and image.getcolors() == [(1024, (128, 128, 128))] for image in blanked)
    assert texts_of(blank(seven)) == texts_of(seven)
    assert [image.tobytes() for image in images_of(seven)] == before


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as png:
        assert png.format == "PNG"
        return np.asarray(png.convert("RGB")).astype(int)


def pixels_of_color(pixels: np.ndarray, color: str) -> int:
    rgb = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    return int((pixels == rgb).all(axis=-1).sum())


def test_the_loss_curve_is_a_png_with_a_falling_line(tmp_path: Path) -> None:
    path = tmp_path / "made" / "loss.png"
    draw_loss_curve([4.0 * 0.9**step for step in range(100)], path)
    pixels = pixels_of(path)
    assert pixels.shape == (560, 1000, 3)
    blue = (pixels == [0x1F, 0x6F, 0xEB]).all(axis=-1)
    heights = [np.flatnonzero(blue[:, x]).mean() for x in (200, 400, 600)]
    assert heights == sorted(heights)  # pixel rows are counted downwards
    assert heights[0] < heights[-1]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("losses", [[1.0], [1.0, 0.0, 0.5]])
def test_short_and_zero_losses_can_be_drawn(tmp_path: Path, losses: list[float]) -> None:
    draw_loss_curve(losses, tmp_path / "loss.png")
    assert pixels_of(tmp_path / "loss.png").shape == (560, 1000, 3)


@pytest.mark.parametrize(("losses", "said"), [([], "there are none"), ([1.0, float("nan")], "iteration 2 has nan")])
def test_a_curve_without_finite_losses_is_refused(tmp_path: Path, losses: list[float], said: str) -> None:
    with pytest.raises(VLBridgeError, match=said):
        draw_loss_curve(losses, tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_the_sheet_has_every_image_and_marks_wrong_answers_only(scans: tuple[Scan, ...], tmp_path: Path) -> None:
    shown = scans[:40]
    images, words = [scan.image for scan in shown], [scan.word for scan in shown]
    draw_answer_sheet(images, words, words, tmp_path / "right.png")
    draw_answer_sheet(images, words, [*words[:-1], "$one$ of\n these many"], tmp_path / "wrong.png")
    right, wrong = pixels_of(tmp_path / "right.png"), pixels_of(tmp_path / "wrong.png")
    assert right.shape == wrong.shape == (75 + 3 * 106, 18 * 86, 3)
    assert pixels_of_color(right, "#d1242f") == 0
    assert pixels_of_color(wrong, "#d1242f") > 100
    for number in range(40):
        row, column = divmod(number, 18)
        cell = right[75 + row * 106 : 75 + row * 106 + 66, column * 86 + 14 : column * 86 + 72]
        assert cell.min() == 0, f"image {number} is missing"
    empty = right[75 + 2 * 106 :, 4 * 86 :]
    assert empty.min() == 255


def test_a_sheet_of_unequal_lists_is_refused(scans: tuple[Scan, ...], tmp_path: Path) -> None:
    with pytest.raises(VLBridgeError, match="1 images, 2 expected and 1 given answers"):
        draw_answer_sheet([scans[0].image], ["zero", "one"], ["zero"], tmp_path / "sheet.png")
    with pytest.raises(VLBridgeError, match="at least one"):
        draw_answer_sheet([], [], [], tmp_path / "sheet.png")
