"""Offline packing of lengths, opening large files, measuring conversations with images, making packs and loss masks.

    python benchmarks/data.py [packing] [lines] [media] [table] [pack] [mask]

Packing: time on one core, and packs compared with the lower bound.

The bound is the sum of the tokens over the capacity, or that of the patches over their limit, whichever is larger; no
packing is below it. Exit code 1 if tokens alone take 0.5 s or more or need 0.1 % more packs than the bound, or with a
limit on patches 5 % more.

Lines: the file is written to the folder for temporary files (0.8 GB). Exit code 1 if opening it with its index takes
1 s or more, or the process grows by 200 MB or more while it opens the file and reads 10,000 random lines. Pages of the
index that it reads are not counted then: they are those of the file, shared by all processes.

Media: conversations with one JPEG of 1024 x 1024 each, of 7 words and of 113 words, measured from headers and encoded.
Exit code 1 if measuring 100,000 takes 60 s of one core or more, or encoding them takes less than 20 times as long.

Table: a table of lengths of 10,000,000 conversations. Exit code 1 if opening it and summing its tokens takes 1 s or
more.

Pack: packs of 32,768 tokens from tokenized samples without images. Exit code 1 if one takes 0.5 ms or more.

Mask: the loss masks of conversations of up to 32,768 tokens, of images or of text, with the published tokenizer of
Qwen3-VL. Exit code 1 if one takes 1 ms or more.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.data.labels.mask import loss_mask
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.labels.turns import Turn
from megatron_vlbridge.data.lengths.measure import Measure
from megatron_vlbridge.data.lengths.table import COLUMNS, LengthTable
from megatron_vlbridge.data.packing.offline import order_packs, pack_lengths
from megatron_vlbridge.data.packing.packs import build_pack
from megatron_vlbridge.data.processors.published import as_conversation_processor
from megatron_vlbridge.data.sources.files.json_lines import JsonLines
from megatron_vlbridge.demo.tiny_processor import build_processor
from tests.published_tokenizer import build_tokenizer

COUNT, LINES = 1_000_000, 10_000_000
LIMIT_S, LIMIT, LIMIT_PATCHES = 0.5, 0.001, 0.05
LIMIT_OPEN_S, LIMIT_OPEN_MB = 1, 200
ROUNDS = 5
LIMIT_INDEX_S, LIMIT_RATIO = 60, 20
TOKENS, LIMIT_PACK_S, LIMIT_MASK_S = 32_768, 0.0005, 0.001

type Ints = np.ndarray


def lengths_of(name: str) -> Ints:
    random = np.random.default_rng(0)
    draws = {
        "lognormal, median 493, in 8k": lambda: random.lognormal(6.2, 1.0, COUNT).clip(16, 8192),
        "uniform 64..4096, in 8k": lambda: random.integers(64, 4097, COUNT),
        "lognormal, median 898, in 32k": lambda: random.lognormal(6.8, 1.1, COUNT).clip(16, 32_768),
        "text 200, images 1200, in 8k": lambda: np.where(
            random.random(COUNT) < 0.5, random.normal(200, 60, COUNT), random.normal(1200, 250, COUNT)
        ).clip(16),
    }
    return draws[name]().astype(np.int64)


CAPACITIES = {
    "lognormal, median 493, in 8k": 8192,
    "uniform 64..4096, in 8k": 8192,
    "lognormal, median 898, in 32k": 32_768,
    "text 200, images 1200, in 8k": 8192,
}


def fastest[T](call: Callable[[], T], rounds: int = ROUNDS) -> tuple[float, T]:
    """Seconds of the processor's time, and the result."""
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        result = call()
        times.append(time.process_time() - begin)
    return min(times), result


def measure_tokens() -> bool:
    print(f"{COUNT:,} lengths, tokens alone; limits {LIMIT_S} s and {LIMIT:.1%} above the bound")
    good = True
    for name, capacity in CAPACITIES.items():
        lengths = lengths_of(name)
        bound = -(-int(lengths.sum()) // capacity)
        seconds, packing = fastest(lambda lengths=lengths, capacity=capacity: pack_lengths(lengths, capacity))
        packs = packing.packs
        above = len(packs) / bound - 1
        good &= seconds < LIMIT_S and above < LIMIT
        ordering, _ = fastest(lambda packs=packs, lengths=lengths: order_packs(packs, lengths, neighbors=8), 1)
        windows, packed = fastest(
            lambda lengths=lengths, capacity=capacity: pack_lengths(lengths, capacity, window=10_000), 1
        )
        print(f"{name:30} {len(packs):7,} packs, {above:+.3%}, {seconds:.2f} s", end="   ")
        print(f"windows of 10,000: {len(packed.packs) / bound - 1:+.3%}, {windows:.2f} s   order {ordering:.2f} s")
    return good


def measure_patches() -> bool:
    lengths = lengths_of("text 200, images 1200, in 8k")
    patches = np.where(lengths > 600, (lengths * 3.2).astype(np.int64), 0)
    print(f"\nText 200, images 1200 of 3.2 patches a token, 8k, with a limit on patches; limit {LIMIT_PATCHES:.0%}")
    good = True
    for limit in (12_288, 16_384, 24_576):
        bound = max(-(-int(lengths.sum()) // 8192), -(-int(patches.sum()) // limit))
        seconds, packing = fastest(
            lambda limit=limit: pack_lengths(lengths, 8192, patches=patches, max_patches=limit), 1
        )
        above = len(packing.packs) / bound - 1
        good &= above < LIMIT_PATCHES
        print(f"{limit:,} patches: {len(packing.packs):7,} packs, {above:+.3%}, {seconds:.2f} s")
    return good


def measure_packing() -> bool:
    good = measure_tokens()
    return measure_patches() and good


def measure_lines() -> bool:
    print(f"\nA JSON Lines file of {LINES:,} lines; limits {LIMIT_OPEN_S} s and {LIMIT_OPEN_MB} MB for opening it")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        with path.open("w") as file:
            file.writelines(f'{{"messages": [{{"role": "user", "content": "number {n}"}}]}}\n' for n in range(LINES))
        # The first process builds the index, the second one finds it.
        found = [
            subprocess.run([sys.executable, __file__, "open", path], stdout=subprocess.PIPE, text=True, check=True)
            for _ in range(2)
        ]
    (build, *_), (seconds, opened, reading, read) = (map(float, run.stdout.split()) for run in found)
    print(f"index built in {build:.1f} s; opened in {seconds:.4f} s and {opened:.1f} MB")
    print(f"10,000 random lines: {reading * 100:.0f} us each, {read:.1f} MB")
    return seconds < LIMIT_OPEN_S and max(opened, read) < LIMIT_OPEN_MB


def measure_media() -> bool:
    print(f"\nConversations with one JPEG of 1024 x 1024; limits {LIMIT_INDEX_S} s for 100,000, {LIMIT_RATIO} times")
    good = True
    processor = build_processor(["a", "picture"], patch_size=16, merge_size=2, min_pixels=65_536, max_pixels=2**24)
    measure = Measure(processor, 1152)
    for repeats in (1, 20):
        with tempfile.TemporaryDirectory() as folder:
            conversations = write_conversations(Path(folder), 200, repeats)
            measuring, table = fastest(lambda: measure(conversations, range(len(conversations))))  # noqa: B023
            encoding, _ = fastest(lambda: [encode_conversation(one, processor) for one in conversations], 1)  # noqa: B023
        assert (table.rows["patches"] == 64 * 64).all()
        seconds, words = measuring / len(conversations) * 100_000, 3 + 4 * repeats + 3 * (repeats // 2)
        ratio = encoding / measuring
        print(f"{words} words: 100,000 measured in {seconds:.0f} s; encoding takes {ratio:.0f} times as long")
        good &= ratio > LIMIT_RATIO and seconds < LIMIT_INDEX_S
    return good


def measure_table() -> bool:
    print(f"\nA table of {LINES:,} lengths; limit {LIMIT_OPEN_S} s")
    rows = np.zeros(LINES, COLUMNS)
    rows["tokens"] = 500
    with tempfile.TemporaryDirectory() as folder:
        LengthTable(rows).save(Path(folder) / "lengths", {})
        opening, table = fastest(lambda: LengthTable.open(Path(folder) / "lengths", {}), 1)
        summing, total = fastest(lambda: table.rows["tokens"].sum(dtype=np.int64), 1)
    assert total == 500 * LINES
    packing, _ = fastest(lambda: pack_lengths(table.rows["tokens"].astype(np.int64), 8192), 1)
    print(f"opened in {opening:.4f} s, tokens summed in {summing:.2f} s, packed in {packing:.1f} s")
    return opening + summing < LIMIT_OPEN_S


def measure_pack() -> bool:
    print(f"\nA pack of {TOKENS:,} tokens; limit {LIMIT_PACK_S * 1e3} ms")
    good, grid = True, torch.zeros(0, 3, dtype=torch.int64)
    for count in (1, 16, 64, 128):
        ids, supervised, patches = (
            torch.arange(TOKENS // count),
            torch.ones(TOKENS // count).bool(),
            torch.zeros(0, 1536),
        )
        samples = [Sample(ids, supervised, patches, grid, patches, grid) for _ in range(count)]
        seconds, _ = fastest(lambda samples=samples: [build_pack(samples, TOKENS, 0) for _ in range(20)])
        good &= seconds / 20 < LIMIT_PACK_S
        print(f"{count:4} samples: {seconds / 20 * 1e3:.3f} ms")
    return good


def measure_mask() -> bool:
    print(f"\nLoss masks; limit {LIMIT_MASK_S * 1e3} ms")
    good = True
    processor = build_processor(["a"], patch_size=16, merge_size=2, min_pixels=1024, max_pixels=1024)
    processor.tokenizer = build_tokenizer()
    adapter = as_conversation_processor(processor)
    words = (Path(__file__).parents[1] / "README.md").read_text().replace("<", " ").split()
    random = np.random.default_rng(0)
    for turns, image_tokens, size in ((2, 16_000, 150), (26, 1200, 15), (1, 0, 18_000), (16, 0, 1120), (100, 0, 170)):
        messages = []
        for _ in range(turns):
            question = "<|image_pad|>" * image_tokens + "What is it?"
            messages += [talk("user", question), talk("assistant", " ".join(random.choice(words, size)))]
        text = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)
        ids = torch.tensor(processor.tokenizer.encode(text))
        rendered = [Turn(message["role"], message["content"]) for message in messages]
        seconds, mask = fastest(
            lambda x=(ids, rendered, messages): loss_mask(*x, adapter, LabelOptions(), allow_no_loss=False)
        )
        assert not mask.excluded_turns
        good &= seconds < LIMIT_MASK_S
        print(
            f"{turns:4} turns, {len(ids):,} tokens, {int(mask.supervised.sum()):,} supervised: {seconds * 1e3:.2f} ms"
        )
    return good


def talk(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def write_conversations(folder: Path, count: int, repeats: int) -> list[list[dict[str, Any]]]:
    """Conversations about one image each, with sentences that are repeated."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    for index in range(count):
        image = Image.fromarray(np.roll(noise, index, 0)).resize((1024, 1024), Image.Resampling.BICUBIC)
        image.save(folder / f"{index}.jpg", quality=85)
    question = {"type": "text", "text": "What is it? " * max(1, repeats // 2)}
    return [
        [
            {"role": "user", "content": [{"type": "image", "image": str(folder / f"{index}.jpg")}, question]},
            {"role": "assistant", "content": "It is a picture. " * repeats},
        ]
        for index in range(count)
    ]


def open_lines(path: str) -> None:
    """Print the time and the growth of this process in MB, for opening a file, and for reading from it."""
    process, indices = psutil.Process(os.getpid()), np.random.default_rng(0).integers(0, LINES, 10_000)
    before, begin = process.memory_info(), time.perf_counter()
    lines = JsonLines(path)
    opened, seconds = process.memory_info(), time.perf_counter() - begin
    assert len(lines) == LINES
    begin = time.perf_counter()
    assert all(lines[n]["messages"][0]["content"] == f"number {n}" for n in indices)
    reading, read = time.perf_counter() - begin, process.memory_info()
    grown = (read.rss - read.shared) - (before.rss - before.shared)
    print(seconds, (opened.rss - before.rss) / 1e6, reading, grown / 1e6)


def main() -> int:
    if sys.argv[1:2] == ["open"]:
        open_lines(sys.argv[2])
        return 0
    measures = {
        "packing": measure_packing,
        "lines": measure_lines,
        "media": measure_media,
        "table": measure_table,
        "pack": measure_pack,
        "mask": measure_mask,
    }
    results = [measures[name]() for name in sys.argv[1:] or measures]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
