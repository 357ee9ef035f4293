"""The digest of a pack distinguishes what the ranks must share, and the error of ranks out of step names it."""

import pytest
import torch

from megatron_vlbridge.model.inputs.digest import PackDigest
from megatron_vlbridge.training.media_guard.agreement import difference

PACK = {
    "tokens": torch.tensor([5, 10, 5, 5]),
    "labels": torch.tensor([-100, 5, 5, -100]),
    "segment_lengths": torch.tensor([3, 1]),
    "pixel_values": torch.randn(4, 6),
    "image_grid_thw": torch.tensor([[1, 2, 2]]),
    "pixel_values_videos": torch.zeros(0, 6),
    "video_grid_thw": torch.zeros(0, 3, dtype=torch.int64),
    "images_per_segment": torch.tensor([1, 0]),
    "videos_per_segment": torch.tensor([0, 0]),
}
CHANGES = {
    "tokens": ("tokens", torch.tensor([5, 10, 5, 6])),
    "labels": ("labels", torch.tensor([-100, 5, 6, -100])),
    "lengths": ("segment_lengths", torch.tensor([2, 2])),
    "grid": ("image_grid_thw", torch.tensor([[1, 4, 1]])),
    "shape of a grid": ("image_grid_thw", torch.tensor([[1], [2], [2]])),
    "video": ("video_grid_thw", torch.tensor([[2, 2, 2]])),
    "images per segment": ("images_per_segment", torch.tensor([0, 1])),
    "videos per segment": ("videos_per_segment", torch.tensor([0, 1])),
    "positions": ("position_ids", torch.zeros(3, 1, 4, dtype=torch.int64)),
    "weights": ("loss_weights", torch.tensor([[1.0, 1.0, 1.25, 1.0]])),
}
NAMES = {"lengths": "segment_lengths", "positions": "position_ids", "weights": "labels"}


@pytest.mark.parametrize("change", CHANGES)
def test_each_part_is_distinguished_by_name(change: str) -> None:
    key, value = CHANGES[change]
    digest, other = PackDigest.of(PACK), PackDigest.of(PACK | {key: value})
    expected = change if change in PACK else NAMES.get(change, "image or video grids")
    assert digest.differences(other) == [expected]
    assert digest.value != other.value


def test_weights_of_labels_are_distinguished_below_the_point() -> None:
    one, other = (PackDigest.of(PACK | {"loss_weights": torch.tensor([[x, 1.0]])}) for x in (1.25, 1.5))
    assert one.differences(other) == ["labels"]


def test_pixels_and_the_kind_of_integer_do_not_matter() -> None:
    digest = PackDigest.of(PACK)
    same = PackDigest.of(
        PACK | {"tokens": PACK["tokens"].int(), "pixel_values": torch.zeros(4, 6), "position_ids": None}
    )
    assert digest == same
    assert digest.value == same.value
    assert str(digest) == "4 tokens, 2 segments, 1 images, 0 videos"


def test_the_first_difference_of_the_readers_is_named() -> None:
    own, other = PackDigest.of(PACK), PackDigest.of(PACK | dict([CHANGES["labels"]]))
    assert difference({"stage 0": [own, other], "stage 1": [own, other], "stage 2": [own, other]}) is None
    text = difference({"stage 0": [own, own, own], "stage 1": [own, own, own], "stage 2": [own, other, own]})
    assert text is not None
    assert text.startswith(
        "stage 2 and stage 0 read different packs: micro-batch 1 since they last agreed differs in lab"
    )
    text = difference({"stage 0": [own, own], "stage 1": [own]})
    assert text is not None
    assert text.startswith("stage 1 has read 1 packs, stage 0 2.")
