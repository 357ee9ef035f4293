"""The host time of `vlm_step` outside the model, and of splitting a global batch.

    python benchmarks/step.py

A dense model of 0.1B parameters takes packs of 8,192 tokens with images on the CPU, one process. Outside the model are
reading, checking and converting the pack, its position ids, and the loss function; a step is all that with the model's
forward and backward (attention recomputed), without an optimizer. Then a global batch of 64 samples, some with images,
is split into 64 and 16 micro-batches. Exit code 1 if the share of the median step is 3 % or more, or a split takes 2 ms
or more.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_vlbridge.backends import cpu_runtime

if __name__ == "__main__":
    cpu_runtime.enable()

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor, nn

from megatron_vlbridge import Qwen3VLModel, read_config, split_global_batch
from megatron_vlbridge.model.transformer_config import language_config
from megatron_vlbridge.training.step import vlm_step

CONFIG = Path(__file__).parents[1] / "tests" / "data" / "configs" / "Qwen3-VL-2B-Instruct.json"
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 16384,
}
VISION = {
    "depth": 6,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_heads": 6,
    "out_hidden_size": 768,
    "deepstack_visual_indexes": [1, 3, 5],
}
TOKENS = {
    "image_token_id": 16001,
    "video_token_id": 16002,
    "vision_start_token_id": 16003,
    "vision_end_token_id": 16004,
}
# 16 conversations of 512 tokens, every second one with an image of 256 tokens.
SEGMENTS, LENGTH, GRID = 16, 512, (1, 32, 32)
STEPS, SPLITS = 3, 101
LARGEST_SHARE, LIMIT_MS = 0.03, 2.0


class Timed(nn.Module):
    """A wrapper, as Megatron's are, that measures the model's forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.seconds = 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the module."""
        begin = time.perf_counter()
        output = self.module(*args, **kwargs)
        self.seconds = time.perf_counter() - begin
        return output


def build_model() -> Qwen3VLModel:
    raw = json.loads(CONFIG.read_text())
    raw = {**raw, **TOKENS, "text_config": raw["text_config"] | TEXT, "vision_config": raw["vision_config"] | VISION}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        hf_config = read_config(folder)
    settings = {"use_cpu_initialization": True, "gradient_accumulation_fusion": False, "params_dtype": torch.float32}
    settings |= {"recompute_granularity": "selective"}  # the attention scores of all layers would take 20 GB
    return Qwen3VLModel(language_config(hf_config, **settings), hf_config)


def make_pack(patch_dim: int) -> dict[str, Tensor]:
    """As the data loader gives it, every tensor with a leading dimension of 1."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 16000, (SEGMENTS, LENGTH), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    image_tokens = GRID[1] * GRID[2] // 4
    tokens[::2, 0], tokens[::2, 1 + image_tokens] = TOKENS["vision_start_token_id"], TOKENS["vision_end_token_id"]
    tokens[::2, 1 : 1 + image_tokens] = TOKENS["image_token_id"]
    labels[::2, : 1 + image_tokens] = -100
    images = torch.tensor([1, 0] * (SEGMENTS // 2))
    pack = {
        "tokens": tokens.flatten(),
        "labels": labels.flatten(),
        "segment_lengths": torch.tensor([LENGTH] * SEGMENTS),
        "pixel_values": torch.randn(SEGMENTS // 2 * GRID[1] * GRID[2], patch_dim, generator=generator),
        "image_grid_thw": torch.tensor([GRID] * (SEGMENTS // 2)),
        "images_per_segment": images,
        "pixel_values_videos": torch.zeros(0, patch_dim),
        "video_grid_thw": torch.zeros(0, 3, dtype=torch.int64),
        "videos_per_segment": torch.zeros_like(images),
    }
    return {key: value[None] for key, value in pack.items()}


def measure_step() -> bool:
    model = build_model()
    timed, pack = Timed(model), make_pack(model.hf_config.vision.patch_dim)
    outside, steps = [], []
    for _ in range(1 + STEPS):
        begin = time.perf_counter()
        output, loss_function = vlm_step(itertools.repeat(pack), timed)
        loss, count, _ = loss_function(output)
        middle = time.perf_counter()
        (loss / count).backward()
        steps.append(time.perf_counter() - begin)
        outside.append(middle - begin - timed.seconds)
        model.zero_grad(set_to_none=True)
    # The first also checks the layout and warms up.
    host, step = statistics.median(outside[1:]), statistics.median(steps[1:])
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    print(f"{size:.2f}B parameters, {SEGMENTS * LENGTH} tokens, {SEGMENTS // 2} images; medians of {STEPS} steps")
    print(f"step {step:.2f} s, vlm_step outside the model {host * 1e3:.1f} ms: {host / step:.2%} of a step")
    print(
        f"the first step, with the checks of the start: {steps[0]:.2f} s, outside the model {outside[0] * 1e3:.0f} ms"
    )
    return host / step < LARGEST_SHARE


def make_global_batch() -> dict[str, Tensor]:
    """64 samples of 1,024 tokens with 1, 2 and 0 images of 256 patches, and positions."""
    counts = torch.tensor([1, 2, 0, 1] * 16)
    images, tokens = int(counts.sum()), torch.ones(64, 1024, dtype=torch.int64)
    return {
        "input_ids": tokens,
        "labels": tokens,
        "position_ids": tokens.expand(3, -1, -1),
        "n_images_per_sample": counts,
        "image_grid_thw": torch.tensor([[1, 16, 16]] * images),
        "pixel_values": torch.zeros(images * 256, 1536),
    }


def median_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(SPLITS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def measure_split(batch: Mapping[str, Tensor]) -> bool:
    worst = 0.0
    for parts in (64, 16):
        worst = max(worst, found := median_ms(lambda parts=parts: split_global_batch(batch, parts)))
        print(f"64 samples split into {parts}: {found:.2f} ms, {found / LIMIT_MS:.2f} of the limit; median of {SPLITS}")
    return worst < LIMIT_MS


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(1)
            small_share = measure_step()
        finally:
            dist.destroy_process_group()
    fast_split = measure_split(make_global_batch())
    return 0 if small_share and fast_split else 1


if __name__ == "__main__":
    sys.exit(main())
