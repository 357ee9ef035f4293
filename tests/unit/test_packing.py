"""Packs hold each sample once within the capacity, and their tensors are the concatenated samples."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen3VLProcessor

from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.data.packing.packs import best_fit, build_pack, next_token_labels
from megatron_vlbridge.demo.tiny_processor import build_processor
from tests.errors import rejects


@st.composite
def lengths_and_capacity(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 40))
    return draw(st.lists(st.integers(1, capacity), max_size=40)), capacity


def best_fit_brute_force(lengths: list[int], capacity: int) -> list[list[int]]:
    """Searches all packs for every sample."""
    packs: list[list[int]] = []
    for index, length in enumerate(lengths):
        free = [capacity - sum(lengths[member] for member in members) for members in packs]
        candidates = [(tokens, target) for target, tokens in enumerate(free) if tokens >= length]
        if candidates:
            packs[min(candidates)[1]].append(index)
        else:
            packs.append([index])
    return packs


@given(lengths_and_capacity())
def test_packing_is_best_fit_and_holds_every_sample_once(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs = best_fit(lengths, capacity)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in members) <= capacity for members in packs)
    assert packs == best_fit_brute_force(lengths, capacity)


@pytest.mark.parametrize("lengths", [[3, 11], [3, 0], [3, -1]])
def test_a_sample_with_an_invalid_length_is_rejected_by_index(lengths: list[int]) -> None:
    with rejects("sample 1", "10 tokens", f"found {lengths[1]}"):
        best_fit(lengths, 10)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    processor: Qwen3VLProcessor = build_processor(
        ["hello", "seven"], patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024
    )
    images = [{"type": "image", "image": Image.new("RGB", size, "red")} for size in ((16, 16), (32, 8))]
    video = {"type": "video", "video": torch.zeros(4, 3, 16, 8, dtype=torch.uint8), "fps": 2}
    questions = ["hello", images, [video, images[0]]]
    return [
        encode_conversation(
            [{"role": "user", "content": question}, {"role": "assistant", "content": "seven"}], processor
        )
        for question in questions
    ]


def test_labels_are_the_next_supervised_token_of_the_same_sample(samples: list[Sample]) -> None:
    all_supervised = dataclasses.replace(samples[0], loss_mask=torch.ones_like(samples[0].loss_mask))
    for sample in (*samples, all_supervised):
        ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
        expected = [ids[i + 1] if i + 1 < len(ids) and mask[i + 1] else -100 for i in range(len(ids))]
        assert next_token_labels([sample]).tolist() == expected
        assert sum(label != -100 for label in expected) == (2 if sample is not all_supervised else len(ids) - 1)


def test_labels_of_many_samples_are_the_next_tokens_of_each(samples: list[Sample]) -> None:
    random = np.random.default_rng(0)
    expected: list[int] = []
    several: list[Sample] = []
    for length in (5, 1, 3, 1, 1, 40):
        ids, mask = random.integers(0, 99, length).tolist(), (random.random(length) < 0.6).tolist()
        several.append(dataclasses.replace(samples[0], input_ids=torch.tensor(ids), loss_mask=torch.tensor(mask)))
        expected += [ids[n + 1] if n + 1 < length and mask[n + 1] else -100 for n in range(length)]
    before = [several[0].input_ids.tolist(), next_token_labels(several[:1]).tolist()]
    assert next_token_labels(several).tolist() == expected
    assert [several[0].input_ids.tolist(), next_token_labels(several[:1]).tolist()] == before


def test_a_pack_is_the_concatenation_of_its_samples(samples: list[Sample]) -> None:
    lengths = [len(sample.input_ids) for sample in samples]
    batch = build_pack(samples, sum(lengths) + 5, pad_token_id=0)
    assert batch["segment_lengths"].tolist() == lengths
    assert batch["images_per_segment"].tolist() == [0, 2, 1]
    assert batch["videos_per_segment"].tolist() == [0, 0, 1]
    token, image, image_row, video, video_row = 0, 0, 0, 0, 0
    for index, sample in enumerate(samples):
        images, videos = int(batch["images_per_segment"][index]), int(batch["videos_per_segment"][index])
        rows, video_rows = len(sample.pixel_values), len(sample.pixel_values_videos)
        assert torch.equal(batch["tokens"][token : token + lengths[index]], sample.input_ids)
        assert torch.equal(batch["labels"][token : token + lengths[index]], next_token_labels([sample]))
        assert torch.equal(batch["image_grid_thw"][image : image + images], sample.image_grid_thw)
        assert torch.equal(batch["pixel_values"][image_row : image_row + rows], sample.pixel_values)
        assert torch.equal(batch["video_grid_thw"][video : video + videos], sample.video_grid_thw)
        assert torch.equal(batch["pixel_values_videos"][video_row : video_row + video_rows], sample.pixel_values_videos)
        token, image, video = token + lengths[index], image + images, video + videos
        image_row, video_row = image_row + rows, video_row + video_rows
    assert batch["tokens"][token:].tolist() == [0] * 5
    assert batch["labels"][token:].tolist() == [-100] * 5
    assert (len(batch["image_grid_thw"]), len(batch["pixel_values"])) == (image, image_row)
    assert (len(batch["video_grid_thw"]), len(batch["pixel_values_videos"])) == (video, video_row)


KEYS = {
    "tokens": torch.int64,
    "labels": torch.int64,
    "segment_lengths": torch.int64,
    "pixel_values": torch.float32,
    "image_grid_thw": torch.int64,
    "pixel_values_videos": torch.float32,
    "video_grid_thw": torch.int64,
    "images_per_segment": torch.int64,
    "videos_per_segment": torch.int64,
}


def test_a_text_only_pack_has_all_keys_and_no_patches(samples: list[Sample]) -> None:
    batch = build_pack(samples[:1], 64, pad_token_id=0)
    assert {key: value.dtype for key, value in batch.items()} == KEYS
    assert batch["pixel_values"].shape == batch["pixel_values_videos"].shape == (0, 96)
    assert batch["image_grid_thw"].shape == batch["video_grid_thw"].shape == (0, 3)
    assert len(batch["tokens"]) == len(batch["labels"]) == 64


def test_a_pack_that_is_too_long_or_empty_is_rejected(samples: list[Sample]) -> None:
    length = len(samples[0].input_ids)
    with rejects(f"at most {length - 1} tokens", f"found 1 samples of [{length}] tokens"):
        build_pack(samples[:1], length - 1, pad_token_id=0)
    with rejects("found 0 samples"):
        build_pack([], 10, pad_token_id=0)
