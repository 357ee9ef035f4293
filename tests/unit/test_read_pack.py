"""A micro-batch of a data loader is converted to model inputs; invalid ones are rejected with the tensor and index."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.layout.positions import mrope_positions
from megatron_vlbridge.model.inputs import Media, PackedInputs
from megatron_vlbridge.training.batch import PACK_KEYS, read_pack
from tests import reference
from tests.errors import rejects

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
    """The valid pack, with a leading dimension of 1, and with `changes` to its tensors."""
    batch = {key: value[None] for key, value in reference.pack(CONVERSATIONS, LENGTH).items()}
    assert set(batch) == set(PACK_KEYS)
    return batch | changes


def changed(key: str, index: object, value: object) -> dict:
    """The valid pack with one element of `key` changed."""
    batch = micro_batch()
    batch[key] = batch[key].clone()
    batch[key][0][index] = value
    return batch


def assert_rejected(batch: dict, *phrases: str) -> None:
    with rejects(*phrases):
        read_pack(batch, CONFIG)


def test_a_valid_pack_is_read_with_all_fields():
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


def test_patches_of_any_float_dtype_are_converted_to_fp32():
    batch = micro_batch()
    half = {key: batch[key].to(torch.bfloat16) for key in ("pixel_values", "pixel_values_videos")}
    patches = read_pack(batch | half, CONFIG).patches
    assert patches.dtype == torch.float32
    assert torch.equal(patches[: half["pixel_values"].shape[1]], half["pixel_values"][0].float())


@pytest.mark.parametrize("key", PACK_KEYS)
def test_a_missing_key_is_rejected(key):
    batch = micro_batch()
    del batch[key]
    assert_rejected(batch, f"missing: ['{key}'], unknown: []")


def test_an_unknown_key_is_rejected():
    assert_rejected(micro_batch(pixel_value=torch.zeros(1)), "missing: [], unknown: ['pixel_value']")


@pytest.mark.parametrize("key", PACK_KEYS)
def test_two_packs_in_one_micro_batch_are_rejected(key):
    batch = micro_batch()
    assert_rejected(batch | {key: torch.cat((batch[key], batch[key]))}, "a leading dimension of 1", f"'{key}': [2, ")


@pytest.mark.parametrize("key", PACK_KEYS)
def test_another_type_dtype_or_number_of_dims_is_rejected(key):
    batch = micro_batch()
    kind = "float32" if key.startswith("pixel") else "int64"
    expected = f"micro-batch, {key}: expected a {kind} tensor with {batch[key].dim()} dims"
    other = batch[key].long() if key.startswith("pixel") else batch[key].float()
    assert_rejected(batch | {key: other}, expected, f"found {other.dtype}")
    assert_rejected(batch | {key: batch[key].tolist()}, expected, "found list")
    assert_rejected(batch | {key: batch[key][0]}, expected, f"found {batch[key].dtype} [{batch[key].shape[1]}")
    assert_rejected(batch | {key: batch[key].flatten()[0]}, expected, f"found {batch[key].dtype} []")


@pytest.mark.parametrize(
    ("batch", "where", "found"),
    [
        (micro_batch(labels=torch.zeros(1, LENGTH - 1).long()), f"labels [{LENGTH - 1}]", f"tokens [{LENGTH}]"),
        (micro_batch(segment_lengths=torch.tensor([[USED, LENGTH]])), f"{LENGTH} tokens", f"{LENGTH}]"),
        (changed("segment_lengths", 1, 0), "segment 1", "length 0"),
        (changed("labels", USED, 5), "padding", f"5 at token {USED}"),
        (changed("labels", 3, 128), "labels: ", "128 at token 3"),
        (changed("labels", 3, -1), "labels: ", "-1 at token 3"),
        (changed("tokens", 1, 500), "tokens: ", "500 at token 1"),
        (changed("tokens", 1, -3), "tokens: ", "-3 at token 1"),
    ],
    ids=["labels", "lengths", "no-tokens", "label-in-padding", "label-high", "label-low", "token-high", "token-low"],
)
def test_invalid_tokens_labels_and_lengths_are_rejected(batch, where, found):
    assert_rejected(batch, where, found)


def test_a_wrong_segment_boundary_is_rejected():
    """A boundary inside an image; the sum of the lengths is right."""
    cut = CONVERSATIONS[0].tokens.tolist().index(reference.IMAGE) + 1
    batch = micro_batch(segment_lengths=torch.tensor([[cut, USED - cut, 1]]))
    assert_rejected(batch, "segment 0", "found 1 image placeholder tokens", "needs 6 tokens")


def test_one_placeholder_fewer_or_more_than_the_grids_is_rejected():
    at = CONVERSATIONS[0].tokens.tolist().index(reference.IMAGE)
    assert_rejected(changed("tokens", at, 50), "found 9 image placeholder tokens", "15 image")
    assert_rejected(changed("tokens", 0, reference.IMAGE), "17 image placeholder tokens")
    assert_rejected(changed("tokens", USED, reference.IMAGE), "padding", "1 image placeholder tokens")
    at = CONVERSATIONS[0].tokens.tolist().index(reference.VIDEO)
    assert_rejected(changed("tokens", at, 50), "video placeholder tokens")


def test_patches_that_do_not_match_the_grids_are_rejected():
    batch = micro_batch()
    pixels, rows = batch["pixel_values"], batch["pixel_values"].shape[1]
    for invalid, shape in ((pixels[:, 1:], [rows - 1, 96]), (pixels[:, :, 1:], [rows, 95])):
        assert_rejected(batch | {"pixel_values": invalid}, "image patches", f"{rows} patches", str(shape))
    empty = batch["pixel_values_videos"][:, :0]
    assert_rejected(batch | {"pixel_values_videos": empty}, "video patches", "[0, 96]")


def test_invalid_grids_are_rejected():
    batch = micro_batch()
    grids = batch["image_grid_thw"].clone()
    grids[0, 0] = torch.tensor([1, 3, 8])  # 24 patches as before
    assert_rejected(batch | {"image_grid_thw": grids}, "image 0: grid (1, 3, 8)", "the merge size 2", "found 3")
    grids[0, 0] = torch.tensor([1, -6, -4])
    assert_rejected(batch | {"image_grid_thw": grids}, "image 0: grid (1, -6, -4)", "positive")
    assert_rejected(batch | {"image_grid_thw": batch["image_grid_thw"][:, :, 1:]}, "image_grid_thw", "[3, 2]")
    assert_rejected(batch | {"image_grid_thw": batch["image_grid_thw"][:, :-1]}, "image patches", "2 grids")


@pytest.mark.parametrize(
    ("key", "counts", "where", "found"),
    [
        ("images_per_segment", [1, 1, 1], "segment 0", "found 10 image placeholder tokens"),
        ("images_per_segment", [2, 1], "images_per_segment: expected 3 counts", "[2, 1]"),
        ("images_per_segment", [2, 0, 2], "images_per_segment", "[2, 0, 2]"),
        ("images_per_segment", [4, -1, 0], "images_per_segment", "[4, -1, 0]"),
        ("videos_per_segment", [0, 2, 0], "segment 0", "found 6 video placeholder tokens"),
    ],
)
def test_counts_that_do_not_match_are_rejected(key, counts, where, found):
    assert_rejected(micro_batch(**{key: torch.tensor([counts])}), where, found)


def positions(dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """`[1, 3, LENGTH]`, other ones than the computed."""
    random = torch.Generator().manual_seed(4)
    return torch.randint(0, 999, (1, 3, LENGTH), generator=random).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_of_a_pack_are_used(dtype):
    given, plain = read_pack(micro_batch(position_ids=positions(dtype)), CONFIG), read_pack(micro_batch(), CONFIG)
    assert torch.equal(given.position_ids, positions()[0][:, None])
    assert given.layout == plain.layout
    assert torch.equal(given.vision_token_index, plain.vision_token_index)
    counts = [place for c in CONVERSATIONS for place in range(len(c.tokens))] + [5] * (LENGTH - USED)
    for none in (None, torch.tensor([counts], dtype=dtype), plain.position_ids[:, 0][None]):
        found = read_pack(micro_batch(position_ids=none), CONFIG, check_position_ids=True)
        assert torch.equal(found.position_ids, plain.position_ids)


@pytest.mark.parametrize(
    ("given", "phrases"),
    [
        (positions().float(), ("expected integers", "torch.float32 [1, 3, 96]")),
        (positions().tolist(), ("expected a tensor of integers", "found list")),
        (positions().repeat(2, 1, 1), ("a leading dimension of 1", "'position_ids': [2, 3, 96]")),
        (positions()[:, :, 1:], ("[1, 3, 96]", "or [1, 96]", "has 96 tokens", "found [1, 3, 95]")),
        (positions()[:, 0, 1:], ("[1, 3, 96]", "or [1, 96]", "has 96 tokens", "found [1, 95]")),
        (positions()[:, :, None], ("[1, 3, 96]", "found [1, 3, 1, 96]")),
        (positions().repeat(1, 2, 1)[:, :4], ("[1, 3, 96]", "found [1, 4, 96]")),
        (positions()[0, 0], ("a leading dimension of 1", "'position_ids': [96]")),
        (torch.arange(LENGTH)[None], (f"token 0 of segment 1 has position {FIRST}, expected 0", "2-D positions")),
    ],
    ids=["floats", "list", "two-packs", "short", "short-row", "four-dims", "four-axes", "no-axis", "one-count"],
)
def test_invalid_positions_are_rejected(given, phrases):
    assert_rejected(micro_batch(position_ids=given), *phrases)


def test_positions_are_compared_with_the_computed_ones_if_wanted():
    batch = micro_batch(position_ids=positions())
    found = positions()[0, :, 0].tolist()
    with rejects(f"token 0 of segment 0 has position {found}, expected [0, 0, 0]", "check_position_ids"):
        read_pack(batch, CONFIG, check_position_ids=True)


@pytest.mark.parametrize("sides", [("left", "left", "left"), ("right", "left", "right")])
def test_a_padded_batch_becomes_the_pack_of_its_samples(sides):
    """The same inputs as the pack without padding, for any pad id: here that of an image."""
    width = max(len(c.tokens) for c in CONVERSATIONS) + 2
    ids = torch.full((3, width), reference.IMAGE)
    labels, mask = torch.full((3, width), 77), torch.zeros(3, width, dtype=torch.int64)
    for row, (c, side) in enumerate(zip(CONVERSATIONS, sides, strict=True)):
        span = slice(0, len(c.tokens)) if side == "right" else slice(width - len(c.tokens), width)
        ids[row, span], labels[row, span], mask[row, span] = c.tokens, c.labels, 1
    batch = {key: value[0] for key, value in micro_batch().items()}
    media = Media(**{key: batch[key] for key in PACK_KEYS[3:]})
    found = PackedInputs.from_padded(ids, mask, media, CONFIG, labels, multiple_of=LENGTH)
    expected = read_pack(micro_batch(), CONFIG)
    assert found.layout.lengths == expected.layout.lengths
    for name in ("position_ids", "patches", "vision_token_index", "labels", "loss_mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.tokens[0, :USED], expected.tokens[0, :USED])


def test_a_stage_without_the_tower_needs_no_patches_but_checks_those_it_gets() -> None:
    none = {key: torch.zeros(1, 0, 0) for key in ("pixel_values", "pixel_values_videos")}
    expected = read_pack(micro_batch(), CONFIG)
    for batch in (micro_batch(), micro_batch(**none)):
        found = read_pack(batch, CONFIG, with_patches=False)
        assert found.patches.shape == (0, CONFIG.vision.patch_dim)
        assert found.digest == expected.digest
        assert torch.equal(found.position_ids, expected.position_ids)
    with rejects("image patches", "found a tensor of shape [0, 0]"):
        read_pack(micro_batch(**none), CONFIG)
    with rejects("image patches"):
        read_pack(micro_batch(pixel_values=micro_batch()["pixel_values"][:, 1:]), CONFIG, with_patches=False)
