"""The memory of data-loader workers, and the speed of packs beside transformers' processor alone.

    python benchmarks/data_loader.py [memory] [speed]

Memory: two epochs of 10,000 conversations with one JPEG of 256 x 256 each, read by two workers. Exit code 1 if what the
workers own (their unique set size) is more than 2 % larger after the second epoch than after the first.

Speed: conversations with one JPEG each, on one core: packs of one and of four of them, and the same conversations
through transformers' processor, images opened with Pillow. Rounds alternate; seconds are those of CPU time. Exit code 1
if the dataset's images per second are less than 0.95 of the processor's, by the medians.
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from megatron_vlbridge import read_config
from megatron_vlbridge.data.dataset import PackedConversations
from megatron_vlbridge.demo.start import write_checkpoint

CONVERSATIONS, WORKERS, LIMIT_GROWTH = 10_000, 2, 0.02
ROUNDS, IMAGES, SIZES, LIMIT_RATIO = 7, 24, (448, 768, 1024, 1536), 0.95


def write(folder: Path, count: int, size: int, files: int) -> list[Any]:
    """Conversations with one image each, of `files` different ones."""
    for index in range(files):
        noise = np.random.default_rng(index).integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
        image.save(folder / f"{index}.jpg", quality=85)
    question = {"type": "text", "text": "Which digit is this?"}
    answer = {"role": "assistant", "content": "three"}
    return [
        [{"role": "user", "content": [{"type": "image", "image": str(folder / f"{n % files}.jpg")}, question]}, answer]
        for n in range(count)
    ]


def dataset(
    folder: Path, conversations: Sequence[Any], pixels: int, packs: int, seq_length: int = 8192
) -> PackedConversations:
    """Packs of these conversations, whose images may have so many pixels."""
    write_checkpoint(folder / "hf", seed=0)
    processor = AutoProcessor.from_pretrained(folder / "hf")
    processor.image_processor.size = {"shortest_edge": 1024, "longest_edge": pixels}
    config = read_config(folder / "hf")
    return PackedConversations(conversations, processor, config, seq_length=seq_length, num_samples=packs)


def owned() -> int:
    """Bytes that only the children of this process have."""
    children = psutil.Process().children(recursive=True)
    return sum(child.memory_full_info().uss for child in children)


def measure_memory() -> bool:
    print(f"\nWorkers over two epochs of {CONVERSATIONS:,} conversations; limit {LIMIT_GROWTH:.0%}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        conversations = write(folder, CONVERSATIONS, 256, 500)
        packs = dataset(folder, conversations, 256 * 256, 10**9)
        first, second = (len(packs.epoch_packs(epoch)) for epoch in range(2))
        loader = DataLoader(packs, batch_size=1, sampler=range(first + second), num_workers=WORKERS)
        # What is in flight comes and goes: the medians of the second half of each epoch.
        sizes: list[list[int]] = [[], []]
        for number, _ in enumerate(loader):
            epoch, place = divmod(number, first)
            if epoch < 2 and place > first // 2:
                sizes[epoch].append(owned())
    one, two = (median(found) for found in sizes)
    growth = two / one - 1
    print(f"{first + second} packs; medians {one / 1e6:.0f} and {two / 1e6:.0f} MB of the epochs, {growth:+.1%}")
    return growth <= LIMIT_GROWTH


def measure_speed() -> bool:
    print(f"\nImages per second of CPU time, packs and the processor alone; limit {LIMIT_RATIO}")
    results = [compare_speed(size, together) for size in SIZES for together in (1, 4)]
    return all(results)


def compare_speed(size: int, together: int) -> bool:
    """Images of `size` x `size`, of which so many fit into a pack."""
    seq_length = together * ((size // 16) ** 2 + 100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        conversations = write(folder, IMAGES, size, IMAGES)
        packs = dataset(folder, conversations, 2**24, 10**6, seq_length)
        count = len(packs.epoch_packs(0))
        alone = partial(run_processor, conversations, packs.processor)
        rounds: dict[str, list[float]] = {"packs": [], "alone": []}
        for _ in range(ROUNDS):
            for kind, call in (("packs", partial(read, packs, count)), ("alone", alone)):
                begin = time.process_time()
                call()
                rounds[kind].append(IMAGES / (time.process_time() - begin))
    ours, theirs = (median(rounds[kind]) for kind in ("packs", "alone"))
    print(f"{size} x {size}, {IMAGES / count:.0f} in a pack: {ours:.1f} and {theirs:.1f}, ratio {ours / theirs:.2f}")
    return ours / theirs >= LIMIT_RATIO


def read(packs: PackedConversations, count: int) -> None:
    """Each pack; none is kept."""
    for item in range(count):
        packs[item]


def run_processor(conversations: Sequence[Any], processor: Any) -> None:
    """Each conversation through transformers' processor."""
    for messages in conversations:
        text = processor.apply_chat_template(messages, tokenize=False)
        with Image.open(messages[0]["content"][0]["image"]) as image:
            processor(text=[text], images=[image.convert("RGB")], return_tensors="pt")


def main() -> int:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    measures = {"memory": measure_memory, "speed": measure_speed}
    results = [measures[name]() for name in sys.argv[1:] or measures]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
