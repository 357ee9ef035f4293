"""Linear attention keeps the segments of a pack apart, whatever their lengths and however slow its state decays."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import reference
from tests.cases import later
from tests.functional import matrix, ranks
from tests.functional.parity import measure
from tests.functional.pool import Layout, Pool

# Shorter than the convolution, and around the length of the kernel's chunks.
LENGTHS = (1, 2, 3, 63, 64, 65)
KINDS, KEY_HEADS = ("linear", "linear-experts"), 4
SPREAD = Layout(tp=2, sp=True, cp=2, world=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("linear")
    return {kind: reference.write_checkpoint(folder / kind, **reference.KINDS[kind]) for kind in KINDS}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that keeps its states for long: all decay by less than two thirds over a token."""
    folder = reference.write_checkpoint(tmp_path_factory.mktemp("slow"), linear={})
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        lowered = {name: x - 3.0 if name.endswith(".A_log") else x for name, x in tensors.items()}
        save_file(lowered, file, metadata={"format": "pt"})
    return folder


def texts(lengths: Sequence[int], seed: int = 0) -> list[reference.Conversation]:
    return [reference.text(length, 100 * seed + number) for number, length in enumerate(lengths)]


@pytest.mark.parametrize("layout", [Layout(), SPREAD, later(Layout(cp=4, world=4))], ids=str)
@pytest.mark.parametrize("kind", ["linear-experts", later("linear")])
def test_segments_around_the_length_of_a_chunk(pool: Pool, folders: dict[str, Path], kind: str, layout: Layout) -> None:
    groups = [texts(LENGTHS), texts(LENGTHS[::-1], 1), [*texts((1, 65, 2), 2), reference.conversation("image", 3)]]
    measure(pool, layout, folders[kind], groups, length=256).check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_of_such_segments(pool: Pool, folders: dict[str, Path], kind: str) -> None:
    measure(pool, Layout(), folders[kind], [texts(LENGTHS), texts(LENGTHS[::-1], 1)], length=None).check()


@pytest.mark.layouts
@pytest.mark.parametrize("layout", [Layout(), Layout(cp=2, world=2)], ids=str)
def test_packs_of_many_short_segments(pool: Pool, slow: Path, layout: Layout) -> None:
    """64 packs of random segments of up to nine tokens."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 10, (64, 5), generator=random).tolist()
    measure(pool, layout, slow, [texts(row, seed) for seed, row in enumerate(lengths)]).check()


@pytest.mark.parametrize("layout", [Layout(), SPREAD], ids=str)
def test_other_segments_change_no_bit(pool: Pool, slow: Path, layout: Layout) -> None:
    """Of a segment's logits and of the gradients of its loss, where no other has a label."""
    # The second, fourth and sixth lie across the ends of chunks.
    lengths = (5, 70, 30, 40, 1, 60, 9)
    kept = 2, 3, 5
    runs = []
    for seed in (1, 2):
        group = texts(lengths, seed)
        for number in kept:
            group[number] = texts(lengths)[number]
        group = [c if i in kept else replace(c, labels=torch.full_like(c.labels, -100)) for i, c in enumerate(group)]
        runs.append(pool.run(ranks.forward_backward, layout, folder=slow, packs=[reference.pack(group, 256)]))
    (before,), (after,) = (ranks.of_packs(run, "logits", layout, [lengths]) for run in runs)
    rows = (x[: sum(lengths)].split(lengths) for x in (before, after))
    for number, (mine, theirs) in enumerate(zip(*rows, strict=True)):
        assert torch.equal(mine, theirs) == (number in kept)
    first, second = (ranks.assemble([result["gradients"] for result in run]) for run in runs)
    assert {name for name, x in first.items() if not torch.equal(x, second[name])} == set()


@pytest.mark.parametrize("layout", [Layout(), later(SPREAD)], ids=str)
@pytest.mark.parametrize("heads", [1, 3, *(pytest.param(heads, marks=pytest.mark.layouts) for heads in (2, 4))])
def test_value_heads_of_a_key_head(pool: Pool, tmp_path: Path, heads: int, layout: Layout) -> None:
    folder = reference.write_checkpoint(tmp_path, linear={"linear_num_value_heads": KEY_HEADS * heads})
    measure(pool, layout, folder, matrix.groups()).check()
