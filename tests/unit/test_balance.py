import itertools

from hypothesis import given
from hypothesis import strategies as st

from megatron_vlbridge.layout.balance import frame_work, share_out

works = st.lists(st.integers(1, 5000), max_size=7)


def load(work: list[int], share: tuple[int, ...]) -> int:
    return sum(work[number] for number in share)


@given(st.lists(st.integers(1, 5000), max_size=90), st.integers(1, 8))
def test_every_item_is_shared_out_once(work: list[int], ranks: int) -> None:
    shares = share_out(work, ranks)
    assert len(shares) == ranks
    assert sorted(number for share in shares for number in share) == list(range(len(work)))


@given(works, st.integers(2, 3))
def test_the_largest_load_is_near_the_best_of_all_ways(work: list[int], ranks: int) -> None:
    found = max(load(work, share) for share in share_out(work, ranks))
    ways = itertools.product(range(ranks), repeat=len(work))
    best = min(
        max(sum(w for w, r in zip(work, way, strict=True) if r == rank) for rank in range(ranks)) for way in ways
    )
    assert best <= found <= best * 4 / 3


def test_one_large_picture_and_three_small_ones() -> None:
    work = [frame_work(patches, 1024) for patches in (64, 4096, 64, 64)]
    assert share_out(work, 2) == ((1,), (0, 2, 3))
    assert share_out(work, 4) == ((1,), (0,), (2,), (3,))
