"""Tokens per second and model FLOP/s of `vlm_step` on a model of 2B size, beside transformers on the same GPU.

    python -m tests.gpu.speed

Random weights in bf16, one pack of conversations with pictures, forward and backward without an optimizer. FLOPs are
those of the model (no recomputation, attention inside conversations and frames alone), for both the same.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_vlbridge import read_config
from megatron_vlbridge.config import Config

CONFIG = Path(__file__).parents[1] / "data/configs/Qwen3-VL-2B-Instruct.json"
Grid = tuple[int, int, int]


def training_flops(config: Config, lengths: Sequence[int], grids: Sequence[Grid]) -> float:
    """FLOPs of a forward and a backward (twice the forward) over conversations of `lengths` and pictures of `grids`."""
    text, vision = config.text, config.vision
    heads, groups = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    layer = text.hidden_size * (2 * heads + 2 * groups + 3 * text.intermediate_size)
    tokens, patches = sum(lengths), sum(t * h * w for t, h, w in grids)
    flops = 2.0 * tokens * (text.num_layers * layer + text.hidden_size * text.vocab_size)
    # Two products of L x L numbers, of which the causal mask leaves half.
    flops += text.num_layers * sum(2 * heads * length**2 for length in lengths)

    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    joined = vision.hidden_size * vision.merge_area
    mergers = (1 + len(vision.deepstack_visual_indexes)) * (joined**2 + joined * vision.out_hidden_size)
    flops += 2.0 * patches * (vision.depth * block + vision.patch_dim * vision.hidden_size)
    flops += 2.0 * patches / vision.merge_area * mergers
    flops += vision.depth * sum(4 * vision.hidden_size * t * (h * w) ** 2 for t, h, w in grids)
    return 3 * flops


def make_pack(config: Config, conversations: Sequence[tuple[Grid, int]]) -> dict[str, torch.Tensor]:
    """One picture and so many words in each conversation."""
    seed = torch.Generator().manual_seed(1)
    tokens, labels, lengths = [], [], []
    for (frames, height, width), words in conversations:
        picture = torch.full((frames * height * width // config.vision.merge_area,), config.image_token_id)
        said = torch.randint(config.vision_start_token_id, (words,), generator=seed)
        tokens += [picture, said]
        labels += [torch.full_like(picture, -100), said[1:], torch.tensor([-100])]
        lengths.append(len(picture) + words)
    grids = torch.tensor([grid for grid, _ in conversations])
    return {
        "tokens": torch.cat(tokens),
        "labels": torch.cat(labels),
        "segment_lengths": torch.tensor(lengths),
        "pixel_values": torch.randn(int(grids.prod(1).sum()), config.vision.patch_dim, generator=seed),
        "image_grid_thw": grids,
        "pixel_values_videos": torch.empty(0, config.vision.patch_dim),
        "video_grid_thw": torch.empty(0, 3, dtype=torch.int64),
        "images_per_segment": torch.ones(len(lengths), dtype=torch.int64),
        "videos_per_segment": torch.zeros(len(lengths), dtype=torch.int64),
    }


def our_step(folder: Path, pack: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Forward and backward by `vlm_step`."""
    from tests.gpu.model import backward, build

    model = build(folder, torch.bfloat16, load=False)

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        return backward(model, pack)

    return step


def their_step(folder: Path, pack: dict[str, torch.Tensor], attention: str) -> Callable[[], torch.Tensor]:
    """Forward and backward of the same pack by transformers, which packs by position ids that start anew."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from megatron_vlbridge.training.batch import read_pack

    config = AutoConfig.from_pretrained(folder)
    with torch.device("cuda"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    positions = read_pack({key: value[None] for key, value in pack.items()}, read_config(folder)).position_ids
    inside = torch.cat([torch.arange(length) for length in pack["segment_lengths"].tolist()])[None, None]
    inputs = {
        "input_ids": pack["tokens"][None],
        "position_ids": torch.cat((inside, positions)),
        "pixel_values": pack["pixel_values"].bfloat16(),
        "image_grid_thw": pack["image_grid_thw"],
    }
    inputs = {name: x.cuda() for name, x in inputs.items()}
    labels = pack["labels"].cuda()

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        logits = model(**inputs, use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        return loss.detach()

    return step


def seconds(step: Callable[[], Any], repeats: int) -> float:
    """Of one step, on average, after three that warm up."""
    for _ in range(3):
        step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=16, help="of 256 picture tokens and 768 words each")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--config", type=Path, default=CONFIG, help="config.json of another model (%(default)s)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was run", file=sys.stderr)
        return 3
    from tests.gpu.model import one_process

    folder = Path(tempfile.mkdtemp())
    try:
        fields = json.loads(arguments.config.read_text())
        if arguments.layers:
            fields["text_config"]["num_hidden_layers"] = arguments.layers
        (folder / "config.json").write_text(json.dumps(fields))
        with one_process("nccl", folder / "store"):
            measure(folder, arguments.conversations, arguments.repeats)
    finally:
        shutil.rmtree(folder)
    return 0


def measure(folder: Path, count: int, repeats: int) -> None:
    """One line for each of the ways to run the pack."""
    config = read_config(folder)
    pack = make_pack(config, [((1, 32, 32), 768)] * count)
    grids: list[Grid] = [(t, h, w) for t, h, w in pack["image_grid_thw"].tolist()]
    flops = training_flops(config, pack["segment_lengths"].tolist(), grids)
    flash = importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    ways: dict[str, Callable[[], Callable[[], torch.Tensor]]] = {
        "vlm_step": lambda: our_step(folder, pack),
        f"transformers, {attention}": lambda: their_step(folder, pack, attention),
    }
    print(f"{len(pack['tokens'])} tokens in {count} conversations, {config.text.num_layers} layers")
    print("\n| | ms | tokens/s | model TFLOP/s | peak GiB |\n|---|---|---|---|---|")
    for name, make in ways.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        took = seconds(make(), repeats)
        peak = torch.cuda.max_memory_allocated() / 2**30
        figures = f"{took * 1e3:.0f} | {len(pack['tokens']) / took:,.0f} | {flops / took / 1e12:.0f} | {peak:.0f}"
        print(f"| {name} | {figures} |")


if __name__ == "__main__":
    sys.exit(main())
