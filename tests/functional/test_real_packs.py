"""Packs of the data pipeline under a layout train like their conversations, one by one, through transformers.

Transformers' part reads the files itself: its processor, its template, its model; nothing of the pipeline is used.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from megatron_vlbridge import read_config
from megatron_vlbridge.data.dataset import PackedConversations
from megatron_vlbridge.data.sources.mixture import open_data
from megatron_vlbridge.families import find
from megatron_vlbridge.layout.positions import mrope_positions
from tests import digits_checkpoint, reference
from tests.cases import later
from tests.functional import ranks, step_ranks
from tests.functional.parity import tolerance
from tests.functional.pool import Layout, Pool

META = """
train:
  - {path: train.jsonl, weight: 0.25}
  - path: videos.jsonl
  - {path: texts.csv, form: columns, columns: {user: question, assistant: answer}}
"""
TEXTS = "question,answer\nthree and four,seven\none and one and one,three\n"
SEQ_LENGTH = 200
KINDS: dict[str, dict[str, bool]] = {"dense": {}, "linear": {"linear": True}}
TP2_SP, PP2, CP2 = Layout(tp=2, sp=True, world=2), Layout(pp=2, world=2), Layout(cp=2, world=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp(kind), **options) for kind, options in KINDS.items()}


def write(folder: Path, **options: bool) -> Path:
    """A checkpoint, and a meta file of conversations about images, about videos (of 4 and 6 frames), and about text."""
    digits_checkpoint.write(folder, conversations=12, **options)
    with (folder / "videos.jsonl").open("w") as lines:
        for number, frames in enumerate((4, 6)):
            pixels = np.random.default_rng(number).integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)
            names = [f"video-{number}-{frame}.png" for frame in range(frames)]
            for name, frame in zip(names, pixels, strict=True):
                Image.fromarray(frame).save(folder / name)
            parts = [{"type": "video", "video": names, "fps": 2}, {"type": "text", "text": "Which digits are these?"}]
            answer = {"role": "assistant", "content": "eight nine"}
            lines.write(json.dumps({"messages": [{"role": "user", "content": parts}, answer]}) + "\n")
    (folder / "texts.csv").write_text(TEXTS)
    (folder / "meta.yaml").write_text(META)
    return folder


@dataclass(frozen=True)
class Expected:
    """What transformers gives for conversations one by one."""

    loss: float
    count: int
    gradients: dict[str, torch.Tensor]


def one_by_one(folder: Path, conversations: Sequence[Any]) -> Expected:
    """The mean loss over all supervised tokens, their number, and every gradient."""
    processor = AutoProcessor.from_pretrained(folder / "hf")
    model = AutoModelForImageTextToText.from_pretrained(folder / "hf", dtype=torch.float32).train()
    total, count = torch.zeros(()), 0
    with reference.recurrent_delta_rule():
        for messages in conversations:
            inputs = processed(processor, messages)
            labels = torch.tensor(next_labels(inputs["input_ids"][0].tolist(), processor.tokenizer))
            total = total + reference.token_losses(model(**inputs, use_cache=False).logits[0], labels).sum()
            count += int((labels != -100).sum())
    (total / count).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return Expected(float(total / count), count, gradients)


def processed(processor: Any, messages: Any) -> dict[str, torch.Tensor]:
    """The processor's output for a conversation, from the files that it names."""
    media: dict[str, Any] = {}
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image":
                media.setdefault("images", []).append(Image.open(part["image"]).convert("RGB"))
            elif part["type"] == "video":
                frames = [torch.from_numpy(np.array(Image.open(name))).permute(2, 0, 1) for name in part["video"]]
                media.setdefault("videos", []).append(torch.stack(frames))
                indices = list(range(len(frames)))
                metadata = VideoMetadata(total_num_frames=len(frames), fps=part["fps"], frames_indices=indices)
                media.setdefault("video_metadata", []).append(metadata)
                media["do_sample_frames"] = False
    text = processor.apply_chat_template(messages, tokenize=False)
    # The prompt of a video as transformers 4.57 writes it, with which the models were released.
    text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    return dict(processor(text=[text], return_tensors="pt", return_mm_token_type_ids=True, **media))


def next_labels(ids: list[int], tokenizer: Any) -> list[int]:
    """Token by token: the next one where it is in an assistant turn, after the header, up to its end token."""
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    header = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    supervised, learning = [False] * len(ids), False
    for index, token in enumerate(ids):
        supervised[index] = learning
        if token == end:
            learning = False
        if ids[index - len(header) + 1 : index + 1] == header:
            learning = True
        assert not (learning and token == start)
    return [ids[i + 1] if i + 1 < len(ids) and supervised[i + 1] else -100 for i in range(len(ids))]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("dense", TP2_SP),
        ("linear", CP2),
        *(later("dense", layout) for layout in (Layout(), PP2, CP2)),
        *(later("linear", layout) for layout in (Layout(), PP2, TP2_SP)),
    ],
    ids=str,
)
def test_packs_of_the_pipeline_train_like_their_conversations(
    pool: Pool, folders: dict[str, Path], kind: str, layout: Layout
) -> None:
    folder = folders[kind]
    config, conversations = read_config(folder / "hf"), open_data(folder / "meta.yaml", "train")
    processor = AutoProcessor.from_pretrained(folder / "hf")
    sizes = {"seq_length": SEQ_LENGTH, "num_samples": 2, "multiple_of": 4}
    dataset = PackedConversations(conversations, processor, config, **sizes)
    members = [dataset.members(item) for item in range(len(dataset))]
    packs = [dataset[item] for item in range(len(dataset))]
    for key in ("image_grid_thw", "video_grid_thw"):
        assert sum(len(pack[key]) for pack in packs)
    assert any(not images + videos for pack in packs for images, videos in media_of(pack)), "no conversation of text"
    packs[0]["position_ids"] = positions(packs[0], config)
    expected = one_by_one(folder, [conversations[member] for pack in members for member in pack])
    results = pool.run(step_ranks.train_step, layout, folder=folder / "hf", packs=packs, vocab_size=336)
    total, count = torch.stack([x for r in results if r["tp_rank"] == 0 for x in r["reports"]]).sum(0).tolist()
    assert count == expected.count
    assert reference.relative_error(total / count, expected.loss) < tolerance(config)
    found = find(config).table(config).to_hf(ranks.assemble([r["gradients"] for r in results]))
    assert found.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert reference.relative_error(found[name], gradient) < tolerance(config), name


def media_of(pack: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """The numbers of images and videos of each conversation."""
    return list(zip(pack["images_per_segment"].tolist(), pack["videos_per_segment"].tolist(), strict=True))


def positions(pack: dict[str, torch.Tensor], config: Any) -> torch.Tensor:
    """`[3, T]`, as a data loader may give them beside the pack."""
    grids = pack["image_grid_thw"], pack["video_grid_thw"]
    return mrope_positions(
        pack["tokens"],
        pack["segment_lengths"],
        *grids,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        merge_size=config.vision.spatial_merge_size,
        images_per_segment=pack["images_per_segment"],
        videos_per_segment=pack["videos_per_segment"],
    )
