"""Clips encoded by whichever transformers is installed: `python -m tests.hf4.videos FOLDER` saves them for another."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers.video_utils import VideoMetadata

from megatron_vlbridge.data.chat import encode_conversation
from megatron_vlbridge.demo.tiny_processor import build_processor

SIZES = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 64 * 24}
# Frames, width, height and frames per second; nothing is resized.
CLIPS = ((2, 24, 16, 2.0), (5, 24, 16, 4.0), (3, 16, 40, 23.976), (8, 8, 8, 0.3), (7, 16, 16, 59.94))
KEYS = ("input_ids", "pixel_values_videos", "video_grid_thw")


def frames(count: int, width: int, height: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def conversation(count: int, width: int, height: int, fps: float) -> list[dict[str, Any]]:
    video = {"type": "video", "video": frames(count, width, height), "fps": fps}
    question = [{"type": "text", "text": "What"}, video, {"type": "text", "text": "is it"}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "seven"}]


def encoded(processor: Any) -> list[dict[str, torch.Tensor]]:
    """As this project encodes them."""
    samples = [encode_conversation(conversation(*clip), processor) for clip in CLIPS]
    return [{key: getattr(sample, key) for key in KEYS} for sample in samples]


def processed(processor: Any) -> list[dict[str, torch.Tensor]]:
    """As the processor alone encodes what its chat template writes."""
    results = []
    for count, width, height, fps in CLIPS:
        metadata = VideoMetadata(total_num_frames=count, fps=fps, frames_indices=list(range(count)))
        text = processor.apply_chat_template(conversation(count, width, height, fps), tokenize=False)
        result = processor(
            text=[text],
            videos=[frames(count, width, height)],
            video_metadata=[metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
        results.append({**{key: result[key] for key in KEYS[1:]}, "input_ids": result["input_ids"][0]})
    return results


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    whole = build_processor(["seven"], **SIZES)
    whole.tokenizer.save_pretrained(folder)
    torch.save({"encoded": encoded(whole), "processed": processed(whole)}, folder / "clips.pt")
