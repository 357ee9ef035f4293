"""Where the first loss that is not finite is, in any part of a pack."""

from megatron_vlbridge.layout.batch_layout import BatchLayout
from megatron_vlbridge.training.metrics.loss_check import BadLoss, PackLoss, first_bad_token

LENGTHS, TOTAL = (5, 12, 3), 32


def pack(bad: dict[int, float], layout: BatchLayout) -> PackLoss:
    """The rank's part of a pack; token i has the loss i and the label 100 + i, each third one is not supervised.

    `bad`: losses of other values by token, padding at -1.
    """
    index = layout.gather_index
    losses = index.clamp(min=0).float()
    for token, loss in bad.items():
        losses[index == token] = loss
    mask = ((index >= 0) & (index % 3 != 0)).float()
    labels = (100 + index.clamp(min=0)) * mask.long()
    total = (losses * mask).sum()
    return PackLoss(layout, labels[None], mask[None], losses[None], total, mask.sum())


NAN, INF = float("nan"), float("inf")
WHOLE = BatchLayout.packed(LENGTHS, TOTAL)


def test_finite_losses_have_no_bad_token() -> None:
    assert first_bad_token(pack({}, WHOLE), 0, 0) is None


def test_the_first_token_is_named_with_its_segment() -> None:
    expected = BadLoss(2, 3, place=8, segment=1, token=3, label=108, loss=INF, tokens=3)
    assert first_bad_token(pack({19: NAN, 8: INF, 14: NAN}, WHOLE), 2, 3) == expected
    first = first_bad_token(pack({0: -INF}, WHOLE), 0, 0)
    assert first == BadLoss(0, 0, place=0, segment=0, token=0, label=None, loss=-INF, tokens=1)
    last = first_bad_token(pack({17: INF}, WHOLE), 0, 0)
    assert last == BadLoss(0, 0, place=17, segment=2, token=0, label=117, loss=INF, tokens=1)


def test_padding_comes_last() -> None:
    padding = first_bad_token(pack({-1: INF}, WHOLE), 0, 0)
    assert padding is not None
    assert (padding.place, padding.segment, padding.label, padding.tokens) == (20, -1, None, 12)
    both = first_bad_token(pack({-1: INF, 19: INF}, WHOLE), 0, 0)
    assert both is not None
    assert (both.place, both.segment, both.token, both.tokens) == (19, 2, 2, 1)


def test_every_part_of_a_split_pack_knows_the_place_in_the_whole() -> None:
    """The first of the ranks' first tokens is that of the whole pack."""
    for bad in ({7: INF, 16: INF}, {4: INF}, {19: INF, 5: INF, 0: INF}):
        whole = first_bad_token(pack(bad, WHOLE), 1, 0)
        parts = [first_bad_token(pack(bad, WHOLE.context_parallel(2, rank)), 1, 0) for rank in (0, 1)]
        found = [part for part in parts if part is not None]
        assert whole is not None
        assert sum(part.tokens for part in found) == len(bad) == whole.tokens
        first = min(found)
        assert (first.place, first.segment, first.token, first.label, first.loss) == (
            whole.place,
            whole.segment,
            whole.token,
            whole.label,
            whole.loss,
        )
