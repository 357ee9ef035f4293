"""A data loader's micro-batch becomes the model's inputs; whatever does not fit is refused with what and where."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vlbridge.config import read_config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.layout.positions import mrope_positions
from megatron_vlbridge.model.inputs import Media, PackedInputs
from megatron_vlbridge.training.batch import PACK_KEYS, read_pack
from tests import reference

REAL = read_config(Path(__file__).parents[1] / "data" / "configs" / "Qwen3-VL-2B-Instruct.json")
CONFIG = replace(
    REAL,
    image_token_id=reference.IMAGE,
    video_token_id=reference.VIDEO,
    text=replace(REAL.text, vocab_size=128),
    vision=replace(REAL.vision, patch_size=4),
)
LENGTH = 96
CONVERSATIONS = [reference.conversation(kind, seed) for kind, seed in (("mixed", 1), ("text", 2), ("image", 3))]
FIRST = len(CONVERSATIONS[0].tokens)
USED = sum(len(c.tokens) for c in CONVERSATIONS)


def micro_batch(**changes: object) -> dict:
    """The right pack, with a data loader's axis, and `changes` to its parts."""
    batch = {key: value[None] for key, value in reference.pack(CONVERSATIONS, LENGTH).items()}
    assert set(batch) == set(PACK_KEYS)
    return batch | changes


def changed(key: str, index: object, value: object) -> dict:
    """The right pack with one number of `key` changed."""
    batch = micro_batch()
    batch[key] = batch[key].clone()
    batch[key][0][index] = value
    return batch


def refused(batch: dict, message: str) -> None:
    with pytest.raises(VLBridgeError, match=message):
        read_pack(batch, CONFIG)


def test_the_right_pack_passes_with_every_field_right():
    batch = micro_batch()
    inputs = read_pack(batch, CONFIG)
    assert inputs.layout.lengths == tuple(len(c.tokens) for c in CONVERSATIONS)
    assert inputs.layout.total == LENGTH
    assert torch.equal(inputs.tokens, batch["tokens"])
    supervised = batch["labels"] != -100
    assert supervised.any()
    assert torch.equal(inputs.loss_mask, supervised.float())
    assert torch.equal(inputs.labels[supervised], batch["labels"][supervised])
    images, videos = (torch.cat([getattr(c, name) for c in CONVERSATIONS]) for name in ("images", "videos"))
    assert torch.equal(inputs.patches, torch.cat((images, videos)))
    assert inputs.frames.grids == (*_grids("image_grids"), *_grids("video_grids"))
    assert inputs.frames.merge_size == 2
    expected = mrope_positions(
        batch["tokens"][0],
        inputs.layout.lengths,
        batch["image_grid_thw"][0],
        batch["video_grid_thw"][0],
        image_token_id=reference.IMAGE,
        video_token_id=reference.VIDEO,
        merge_size=2,
    )
    assert torch.equal(inputs.position_ids, expected[:, None])
    kinds = batch["tokens"][0][inputs.vision_token_index].tolist()
    image_tokens, video_tokens = len(images) // 4, len(videos) // 4
    assert kinds == [reference.IMAGE] * image_tokens + [reference.VIDEO] * video_tokens
    assert inputs.vision_token_index[:image_tokens].tolist() == sorted(
        inputs.vision_token_index[:image_tokens].tolist()
    )


def _grids(name: str) -> list[tuple[int, ...]]:
    return [tuple(grid) for c in CONVERSATIONS for grid in getattr(c, name).tolist()]


def test_patches_come_as_fp32_whatever_float_they_were():
    batch = micro_batch()
    half = {key: batch[key].to(torch.bfloat16) for key in ("pixel_values", "pixel_values_videos")}
    patches = read_pack(batch | half, CONFIG).patches
    assert patches.dtype == torch.float32
    assert torch.equal(patches[: half["pixel_values"].shape[1]], half["pixel_values"][0].float())


@pytest.mark.parametrize("key", PACK_KEYS)
def test_a_missing_key_is_refused(key):
    batch = micro_batch()
    del batch[key]
    refused(batch, rf"missing: \['{key}'\], unknown: \[\]")


def test_an_unknown_key_is_refused():
    refused(micro_batch(pixel_value=torch.zeros(1)), r"missing: \[\], unknown: \['pixel_value'\]")


@pytest.mark.parametrize("key", PACK_KEYS)
def test_two_packs_in_one_micro_batch_are_refused(key):
    batch = micro_batch()
    refused(batch | {key: torch.cat((batch[key], batch[key]))}, rf"leading axis of 1; found .*'{key}': \[2, ")


@pytest.mark.parametrize("key", PACK_KEYS)
def test_other_than_tensors_of_the_right_kind_are_refused(key):
    batch = micro_batch()
    kind = "float32" if key.startswith("pixel") else "int64"
    wanted = f"{key} of a micro-batch: expected a {kind} tensor of {batch[key].dim()} dims, found"
    other = batch[key].long() if key.startswith("pixel") else batch[key].float()
    refused(batch | {key: other}, f"{wanted} {other.dtype}")
    refused(batch | {key: batch[key].tolist()}, f"{wanted} list")
    refused(batch | {key: batch[key][0]}, rf"{wanted} {batch[key].dtype} \[{batch[key].shape[1]}")
    refused(batch | {key: batch[key].flatten()[0]}, rf"{wanted} {batch[key].dtype} \[\]")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (micro_batch(labels=torch.zeros(1, LENGTH - 1).long()), rf"labels \[{LENGTH - 1}\] and tokens \[{LENGTH}\]"),
        (micro_batch(segment_lengths=torch.tensor([[USED, LENGTH]])), rf"do not fit a pack of {LENGTH} tokens"),
        (changed("segment_lengths", 1, 0), "segment 1 of the pack has length 0"),
        (changed("labels", USED, 5), rf"padding have a label, the first is 5 at token {USED} of the pack"),
        (changed("labels", 3, 128), "labels: 1 ids lie outside the vocabulary of 128, the first is 128 at token 3"),
        (changed("labels", 3, -1), "labels: 1 ids lie outside the vocabulary of 128, the first is -1 at token 3"),
        (changed("tokens", 1, 500), "tokens: 1 ids lie outside the vocabulary of 128, the first is 500 at token 1"),
        (changed("tokens", 1, -3), "tokens: 1 ids lie outside the vocabulary of 128, the first is -3 at token 1"),
    ],
    ids=["labels", "lengths", "no-tokens", "label-in-padding", "label-high", "label-low", "token-high", "token-low"],
)
def test_tokens_labels_and_lengths_that_do_not_fit_are_refused(batch, message):
    refused(batch, message)


def test_a_segment_border_in_the_wrong_place_is_refused():
    """A border that cuts a picture in two; the sum is still right."""
    cut = CONVERSATIONS[0].tokens.tolist().index(reference.IMAGE) + 1
    refused(
        micro_batch(segment_lengths=torch.tensor([[cut, USED - cut, 1]])),
        "segment 0: found 1 image placeholder tokens; image 0 with grid .* needs 6 tokens",
    )


def test_one_placeholder_fewer_or_more_than_the_grids_is_refused():
    at = CONVERSATIONS[0].tokens.tolist().index(reference.IMAGE)
    refused(changed("tokens", at, 50), "found 9 image placeholder tokens; .*in all 15 image .* that make 16")
    refused(changed("tokens", 0, reference.IMAGE), "in all 17 image placeholder tokens")
    refused(changed("tokens", USED, reference.IMAGE), "padding: 1 image placeholder tokens")
    at = CONVERSATIONS[0].tokens.tolist().index(reference.VIDEO)
    refused(changed("tokens", at, 50), "video placeholder tokens")


def test_patches_that_do_not_fit_the_grids_are_refused():
    batch = micro_batch()
    pixels, rows = batch["pixel_values"], batch["pixel_values"].shape[1]
    for wrong, found in (
        (pixels[:, 1:], rf"\[{rows - 1}, 96\]"),
        (pixels[:, :, 1:], rf"\[{rows}, 95\]"),
    ):
        refused(
            batch | {"pixel_values": wrong}, f"image patches: .*stand for {rows} patches of 96 values, found .*{found}"
        )
    refused(batch | {"pixel_values_videos": batch["pixel_values_videos"][:, :0]}, r"video patches: .*found .*\[0, 96\]")


def test_invalid_grids_are_rejected():
    batch = micro_batch()
    grids = batch["image_grid_thw"].clone()
    grids[0, 0] = torch.tensor([1, 3, 8])  # 24 patches as before
    refused(batch | {"image_grid_thw": grids}, r"image 0: grid \(1, 3, 8\): .*divisible by the merge size 2, found 3")
    grids[0, 0] = torch.tensor([1, -6, -4])
    refused(batch | {"image_grid_thw": grids}, r"image 0: grid \(1, -6, -4\): expected h to be a positive number")
    refused(
        batch | {"image_grid_thw": batch["image_grid_thw"][:, :, 1:]},
        r"image_grid_thw: expected int64 \[n, 3\].*\[3, 2\]",
    )
    refused(batch | {"image_grid_thw": batch["image_grid_thw"][:, :-1]}, "image patches: the 2 grids")


@pytest.mark.parametrize(
    ("key", "counts", "message"),
    [
        ("images_per_segment", [1, 1, 1], "segment 0: found 10 image placeholder tokens; its 1 images"),
        ("images_per_segment", [2, 1], r"images_per_segment: expected 3 counts .* found \[2, 1\]"),
        ("images_per_segment", [2, 0, 2], r"images_per_segment: .*sum to 3 grids, found \[2, 0, 2\]"),
        ("images_per_segment", [4, -1, 0], r"images_per_segment: .*found \[4, -1, 0\]"),
        ("videos_per_segment", [0, 2, 0], "segment 0: found 6 video placeholder tokens; its 0 videos"),
    ],
)
def test_counts_that_do_not_fit_are_refused(key, counts, message):
    refused(micro_batch(**{key: torch.tensor([counts])}), message)


@pytest.mark.parametrize("sides", [("left", "left", "left"), ("right", "left", "right")])
def test_a_padded_batch_becomes_the_pack_of_its_samples(sides):
    """The same inputs as the pack without padding, whatever the pad id is: here that of an image."""
    width = max(len(c.tokens) for c in CONVERSATIONS) + 2
    ids = torch.full((3, width), reference.IMAGE)
    labels, mask = torch.full((3, width), 77), torch.zeros(3, width, dtype=torch.int64)
    for row, (c, side) in enumerate(zip(CONVERSATIONS, sides, strict=True)):
        place = slice(0, len(c.tokens)) if side == "right" else slice(width - len(c.tokens), width)
        ids[row, place], labels[row, place], mask[row, place] = c.tokens, c.labels, 1
    batch = {key: value[0] for key, value in micro_batch().items()}
    media = Media(**{key: batch[key] for key in PACK_KEYS[3:]})
    found = PackedInputs.from_padded(ids, mask, media, CONFIG, labels, multiple_of=LENGTH)
    expected = read_pack(micro_batch(), CONFIG)
    assert found.layout.lengths == expected.layout.lengths
    for name in ("position_ids", "patches", "vision_token_index", "labels", "loss_mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.tokens[0, :USED], expected.tokens[0, :USED])
