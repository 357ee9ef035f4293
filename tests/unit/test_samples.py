"""Parts of a batch: every sample keeps its own images and videos, and what does not belong together is an error."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlbridge import check_batch, read_config, select_samples, split_global_batch
from megatron_vlbridge.config import Config
from tests import reference
from tests.errors import rejects

SEQUENCE, WIDTH = 6, 3
Batch = dict[str, Tensor]


def marked_batch(seed: int) -> tuple[Batch, list[dict[str, list[Tensor]]]]:
    """A random batch whose every value tells its sample, and for each sample its images and videos one by one."""
    draw = random.Random(seed)
    size = draw.randint(1, 9)
    samples: list[dict[str, list[Tensor]]] = []
    batch: Batch = {"input_ids": torch.arange(size)[:, None].expand(size, SEQUENCE).clone()}
    if draw.random() < 0.5:
        batch["position_ids"] = batch["input_ids"].expand(3, size, SEQUENCE).clone()
    for kind, grids, pixels in (
        ("images", "image_grid_thw", "pixel_values"),
        ("videos", "video_grid_thw", "pixel_values_videos"),
    ):
        counts = [draw.choice([0, 0, 1, 2, 3]) for _ in range(size)]
        shapes = [[[draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 4)] for _ in range(n)] for n in counts]
        for sample in range(size):
            if kind == "images":
                samples.append({})
            samples[sample][kind] = [
                torch.full((t * h * w, WIDTH), 100.0 * sample + item) for item, (t, h, w) in enumerate(shapes[sample])
            ]
        if sum(counts) or draw.random() < 0.5:
            batch[f"n_{kind}_per_sample"] = torch.tensor(counts)
            batch[grids] = torch.tensor(
                [grid for of_sample in shapes for grid in of_sample], dtype=torch.int64
            ).reshape(-1, 3)
            every = [item for sample in samples for item in sample[kind]]
            batch[pixels] = torch.cat(every) if every else torch.zeros(0, WIDTH)
    if "video_grid_thw" in batch:
        batch["second_per_grid_ts"] = torch.tensor([float(x[0, 0]) for s in samples for x in s["videos"]])
    return batch, samples


def assert_holds(part: Batch, chosen: list[int], samples: list[dict[str, list[Tensor]]]) -> None:
    """The samples and their media, in this order, and nothing else."""
    assert part["input_ids"].tolist() == [[sample] * SEQUENCE for sample in chosen]
    if "position_ids" in part:
        assert part["position_ids"].tolist() == [part["input_ids"].tolist()] * 3
    for kind, grids, pixels in (
        ("images", "image_grid_thw", "pixel_values"),
        ("videos", "video_grid_thw", "pixel_values_videos"),
    ):
        if pixels not in part:
            continue
        items = [item for sample in chosen for item in samples[sample][kind]]
        assert torch.equal(part[pixels], torch.cat(items) if items else torch.zeros(0, WIDTH))
        assert part[grids].prod(1).tolist() == [len(item) for item in items]
        assert part[f"n_{kind}_per_sample"].tolist() == [len(samples[sample][kind]) for sample in chosen]
    if "second_per_grid_ts" in part:
        assert part["second_per_grid_ts"].tolist() == [
            float(x[0, 0]) for sample in chosen for x in samples[sample]["videos"]
        ]


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.layouts) for part in range(1, 5))])
def test_each_part_has_the_patches_of_its_samples(part: int) -> None:
    """In 5,000 random batches, 1,000 at a time."""
    for seed in range(1000 * part, 1000 * (part + 1)):
        batch, samples = marked_batch(seed)
        size, draw = len(samples), random.Random(seed + 1)
        parts = split_global_batch(batch, draw.randint(1, size))
        lengths = [len(part["input_ids"]) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        assert lengths == sorted(lengths, reverse=True)
        start = 0
        for part, length in zip(parts, lengths, strict=True):
            assert part.keys() == batch.keys()
            check_batch(part)
            assert_holds(part, list(range(start, start + length)), samples)
            start += length
        assert start == size
        chosen = draw.choices(range(size), k=draw.randint(1, size))
        assert_holds(select_samples(batch, chosen), chosen, samples)


@pytest.mark.parametrize(("size", "parts", "expected"), [(5, 4, [2, 1, 1, 1]), (7, 3, [3, 2, 2]), (4, 4, [1] * 4)])
def test_parts_may_be_unequal(size: int, parts: int, expected: list[int]) -> None:
    found = split_global_batch({"tokens": torch.zeros(size, 2, dtype=torch.int64)}, parts)
    assert [len(part["tokens"]) for part in found] == expected


def test_parts_are_views() -> None:
    """So that splitting copies no pixels."""
    batch, _ = marked_batch(3)
    for key, tensor in split_global_batch(batch, 1)[0].items():
        assert tensor.data_ptr() == batch[key].data_ptr(), key


def image_batch() -> Batch:
    """Two samples, with one and two images."""
    return {
        "input_ids": torch.zeros(2, 5, dtype=torch.int64),
        "labels": torch.zeros(2, 5, dtype=torch.int64),
        "n_images_per_sample": torch.tensor([1, 2]),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 4], [1, 2, 2]]),
        "pixel_values": torch.zeros(16, 4),
    }


def test_whole_images_are_cut_by_their_sizes() -> None:
    """As for Mistral3: images `[N, C, H, W]`, padded to the largest, and their sizes in pixels."""
    batch = image_batch() | {"pixel_values": torch.arange(3.0)[:, None, None, None].expand(3, 3, 8, 8)}
    batch["image_sizes"] = batch.pop("image_grid_thw")[:, 1:] * 4
    first, second = split_global_batch(batch, 2)
    assert first["pixel_values"].unique().tolist() == [0.0]
    assert second["pixel_values"].unique().tolist() == [1.0, 2.0]
    assert second["image_sizes"].tolist() == [[8, 16], [8, 8]]
    assert select_samples(batch, [1])["pixel_values"].shape == (2, 3, 8, 8)
    with rejects("expected 3 patches, those of 3 grids, found 2"):
        check_batch(batch | {"pixel_values": batch["pixel_values"][1:]})


def test_patches_may_be_images() -> None:
    """As for Kimi: `[patches, C, P, P]`; and positions may be times, as for Qwen3-Omni."""
    batch = image_batch() | {"pixel_values": torch.arange(16.0)[:, None, None, None].expand(16, 3, 2, 2)}
    batch["position_ids"] = torch.full((3, 2, 5), 0.5)
    first, second = split_global_batch(batch, 2)
    assert (first["pixel_values"].unique().tolist(), len(second["pixel_values"])) == ([0.0, 1.0, 2.0, 3.0], 12)
    with rejects("pixel_values: expected [patches, D] or [patches, C, H, W], found [16, 3, 4]"):
        check_batch(batch | {"pixel_values": torch.zeros(16, 3, 4)})


MEDIA = ("image_grid_thw", "pixel_values")
# What is done to a batch, and phrases of the error.
CHANGES: dict[str, tuple[Callable[[Batch], Any], str]] = {
    "unknown key": (lambda b: b.update(pixels=torch.zeros(2)), "only keys of .*, found pixels"),
    "count too many": (lambda b: b.update(n_images_per_sample=torch.tensor([2, 2])), "of 3 images, found [2, 2]"),
    "count too few": (lambda b: b.update(n_images_per_sample=torch.tensor([1, 1])), "which sum to 2"),
    "negative count": (lambda b: b.update(n_images_per_sample=torch.tensor([4, -1])), "counts >= 0"),
    "a count for one sample": (lambda b: b.update(n_images_per_sample=torch.tensor([3])), "n_images_per_sample"),
    "no counts": (lambda b: b.pop("n_images_per_sample"), "expected n_images_per_sample beside it"),
    "no grids": (lambda b: b.pop("image_grid_thw"), "expected image_grid_thw beside it"),
    "no patches": (lambda b: b.pop("pixel_values"), "expected pixel_values beside it"),
    "a patch less": (lambda b: b.update(pixel_values=torch.zeros(15, 4)), "expected 16 patches.*found 15"),
    "an empty grid": (lambda b: b["image_grid_thw"].__setitem__((1, 1), 0), "found [1, 0, 4] of image 1"),
    "two names of the grids": (lambda b: b.update(grid_thws=b["image_grid_thw"]), "found both"),
    "grids of two numbers": (
        lambda b: b.update(image_grid_thw=torch.ones(3, 2).long()),
        "images, 3], found [3, 2]",
    ),
    "labels of another batch": (lambda b: b.update(labels=torch.zeros(3, 5).long()), "labels.*found [3, 5]"),
    "positions of samples first": (lambda b: b.update(position_ids=torch.zeros(2, 3, 5).long()), "[3, B, S]"),
    "tokens in floats": (lambda b: b.update(input_ids=torch.zeros(2, 5)), "expected integers"),
    "patches in bytes": (lambda b: b.update(pixel_values=torch.zeros(16, 4).byte()), "expected floats"),
    "no tokens": (
        lambda b: [b.pop(key) for key in tuple(b) if key not in MEDIA],
        "tensor of samples",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_belong_together_is_rejected(change: str) -> None:
    batch = image_batch()
    check_batch(batch)
    edit, words = CHANGES[change]
    edit(batch)
    for function in (check_batch, lambda b: split_global_batch(b, 1), lambda b: select_samples(b, [0])):
        with rejects(*words.split(".*")):
            function(batch)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return read_config(reference.write_checkpoint(tmp_path_factory.mktemp("tiny")))


def test_placeholders_are_those_of_the_samples_own_media(config: Config) -> None:
    conversations = [reference.conversation(kind, seed) for seed, kind in enumerate(("mixed", "text", "image"))]
    padded = reference.padded_batch(conversations)
    batch = {key: padded[key] for key in ("input_ids", "pixel_values", "image_grid_thw", "pixel_values_videos")}
    batch |= {"video_grid_thw": padded["video_grid_thw"], "n_images_per_sample": torch.tensor([2, 0, 1])}
    batch["n_videos_per_sample"] = torch.tensor([2, 0, 0])
    check_batch(batch, config)
    check_batch(select_samples(batch, [2, 0]), config)
    batch["n_images_per_sample"] = torch.tensor([1, 1, 1])
    with rejects("sample 0: expected 6 image tokens, those of its 1 images, found 10"):
        check_batch(batch, config)


@pytest.mark.parametrize("parts", [0, 3])
def test_more_parts_than_samples_are_rejected(parts: int) -> None:
    with rejects(f"found 2 samples for {parts} parts"):
        split_global_batch(image_batch(), parts)


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_out_of_the_batch_is_rejected(index: int) -> None:
    with rejects(f"2 samples, found {index}"):
        select_samples(image_batch(), [0, index])
