"""What `vlm_step` adds to each micro-batch and iteration to compare packs: the digest, and the exchange of four ranks.

    python -m benchmarks.guard

The digest is that of a pack of 32,768 tokens in 15 conversations with 40 images, on one thread, in CPU time; the
exchange is that of the end of an iteration, over gloo between four processes (two pipeline stages, two
context-parallel ranks). Prints medians.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from megatron_vlbridge.model.inputs.digest import PackDigest
from tests.functional.pool import Layout, Pool

TOKENS, ROUNDS = 32_768, 51


def digest_seconds() -> float:
    counts = torch.ones(15, dtype=torch.int64)
    pack = {
        "tokens": torch.randint(1000, (TOKENS,)),
        "labels": torch.randint(1000, (TOKENS,)),
        "segment_lengths": counts * 2000,
        "image_grid_thw": torch.ones(40, 3, dtype=torch.int64),
        "video_grid_thw": torch.zeros(0, 3, dtype=torch.int64),
        "images_per_segment": counts,
        "videos_per_segment": counts,
    }
    return _median(lambda: PackDigest.of(pack), time.process_time)


def exchange_seconds(layout: Layout, folder: Path) -> float:
    """Runs in the workers."""
    from megatron_vlbridge.training.media_guard.guard import check_iteration
    from tests.functional.ranks import build_model

    model = build_model(layout, folder, load=False)
    return _median(lambda: check_iteration([model]), time.perf_counter)


def _median(function: object, clock: object) -> float:
    times = []
    for _ in range(ROUNDS):
        start = clock()
        function()
        times.append(clock() - start)
    return statistics.median(times)


if __name__ == "__main__":
    from tests import reference

    torch.set_num_threads(1)
    print(f"digest of a pack of {TOKENS:,} tokens   {1e3 * digest_seconds():.2f} ms")
    with tempfile.TemporaryDirectory() as folder:
        reference.write_checkpoint(Path(folder))
        pool = Pool()
        seconds = pool.run(exchange_seconds, Layout(pp=2, cp=2, world=4), folder=Path(folder))
        pool.close()
    print(f"exchange of four ranks per iteration    {1e3 * max(seconds):.2f} ms")
