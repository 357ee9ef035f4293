"""Rows that become the segments of a pack, and arguments of other frameworks."""

import re

import pytest
import torch

from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.model.call.build import RawBatch
from megatron_vlbridge.model.call.keywords import check_keywords
from megatron_vlbridge.model.call.table import Table, keep_mask
from megatron_vlbridge.model.inputs import GivenPositions

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
LEFT_AND_RIGHT = torch.tensor([[False, False, True, True], [True, True, True, False]])


def refused(words: str) -> "pytest.RaisesExc[VLBridgeError]":
    return pytest.raises(VLBridgeError, match=re.escape(words))


def test_the_tokens_of_a_mask_begin_their_segments() -> None:
    table = Table.in_segments(LEFT_AND_RIGHT, [0, 4, 7], None)
    assert table.row(IDS, 0).tolist() == [[3, 4, 0, 0, 5, 6, 7]]
    assert (table.cu_seqlens, table.lengths) == ((0, 4, 7), (2, 3))
    assert table.row(torch.stack((IDS, -IDS)), 9)[1].tolist() == [[-3, -4, 9, 9, -5, -6, -7]]


def test_lengths_say_what_of_the_mask_is_padding() -> None:
    table = Table.in_segments(torch.ones_like(IDS, dtype=torch.bool), [0, 4, 8], [3, 1])
    assert table.row(IDS, 0).tolist() == [[1, 2, 3, 0, 5, 0, 0, 0]]
    assert table.lengths == (3, 1)


def test_positions_of_rows_become_those_of_the_pack() -> None:
    table = Table.in_segments(LEFT_AND_RIGHT, [0, 4, 7], None)
    for ids, expected in ((IDS, [1, 7]), (torch.stack((IDS, IDS, -IDS)), [3, 1, 7])):
        positions = table.positions(GivenPositions(ids, compared=True))
        assert positions is not None
        assert positions.compared
        assert list(positions.ids.shape) == expected
        assert positions.ids.view(-1, 7)[-1].abs().tolist() == [3, 4, 0, 0, 5, 6, 7]
    assert table.positions(None) is None


def test_a_tensor_of_another_shape_is_a_row_already() -> None:
    row = torch.arange(7)[None]
    assert Table.in_segments(LEFT_AND_RIGHT, [0, 4, 7], None).row(row, 0) is row


@pytest.mark.parametrize(
    ("bounds", "lengths", "words"),
    [
        ([0, 7], None, "attention_mask has 2 rows, but cu_seqlens has 1 segments"),
        ([0, 4, 8, 9], None, "cu_seqlens has 3 segments"),
        ([0, 4, 6], None, "row 1: it keeps 3 tokens, but cu_seqlens gives its segment 3 tokens, 2 with padding"),
        ([0, 4, 8], [2, 4], "row 1: it keeps 3 tokens, but cu_seqlens gives its segment 4 tokens, 4 with padding"),
        ([0, 4, 8], [0, 3], "row 0: it keeps 2 tokens, but cu_seqlens gives its segment 0 tokens"),
        ([0, 4, 8], [2], "cu_seqlens has 2 segments"),
    ],
)
def test_a_mask_that_disagrees_with_the_segments_is_rejected(
    bounds: list[int], lengths: list[int] | None, words: str
) -> None:
    with refused(words):
        Table.in_segments(LEFT_AND_RIGHT, bounds, lengths)


def test_a_row_without_text_is_rejected() -> None:
    mask = LEFT_AND_RIGHT.clone()
    mask[0] = False
    with refused("row 0: it keeps 0 tokens"):
        Table.in_segments(mask, [0, 4, 8], None)


def test_rows_are_one_after_the_other() -> None:
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    table = Table.of_rows(mask)
    assert table.row(IDS, 0).tolist() == [[1, 2, 0, 0, 5, 6, 7, 8]]
    assert (table.cu_seqlens, table.lengths) == ((0, 4, 8), (2, 4))
    with refused("row 0: context parallelism splits padded rows"):
        Table.of_rows(LEFT_AND_RIGHT)


@pytest.mark.parametrize("mask", [LEFT_AND_RIGHT, LEFT_AND_RIGHT.long(), ~LEFT_AND_RIGHT[:, None, None, :]])
def test_masks_of_transformers_and_of_megatron(mask: torch.Tensor) -> None:
    found = keep_mask(mask, IDS)
    assert found is not None
    assert torch.equal(found, LEFT_AND_RIGHT)


@pytest.mark.parametrize(
    "mask",
    [
        LEFT_AND_RIGHT[:, 1:],
        LEFT_AND_RIGHT.long() * 2,
        ~LEFT_AND_RIGHT[:, None, None, :].long(),
        torch.ones(2, 1, 4, 4, dtype=torch.bool),
    ],
)
def test_another_mask_is_rejected(mask: torch.Tensor) -> None:
    with refused(f"attention_mask: expected [2, 4] as input_ids, found {mask.dtype} {list(mask.shape)}".split(",")[0]):
        keep_mask(mask, IDS)


def test_arguments_that_would_change_the_result_are_rejected_by_name() -> None:
    check_keywords({"force_vit_image": True, "witness_ids": IDS, "force_vit_video": True, "inference_params": None})
    with refused("arguments runtime_gather_output, temperature, which"):
        check_keywords({"temperature": 1.0, "runtime_gather_output": True, "witness_ids": IDS})


def test_tokens_without_loss_are_those_of_the_mask_and_of_the_labels() -> None:
    labels = torch.tensor([[4, -100, 6]])
    assert RawBatch(labels=labels).supervised(with_mtp=True) is not None
    found = RawBatch(labels=labels, loss_mask=torch.tensor([[0.0, 1.0, 0.5]])).supervised(with_mtp=False)
    assert found is not None
    assert found.tolist() == [[-100, -100, 6]]
    assert RawBatch(loss_mask=labels).supervised(with_mtp=False) is None
    with refused("loss_mask: expected [1, 3] as the labels, found [1, 2]"):
        RawBatch(labels=labels, loss_mask=torch.ones(1, 2)).supervised(with_mtp=False)
    with refused("loss_mask: the loss of the MTP layer takes 0 and 1 alone"):
        RawBatch(labels=labels, loss_mask=torch.full((1, 3), 0.5)).supervised(with_mtp=True)


def test_a_mask_and_lengths_are_not_given_both() -> None:
    raw = RawBatch(IDS, attention_mask=LEFT_AND_RIGHT, cu_seqlens=[0, 4, 8], lengths=[2, 3])
    with refused("attention_mask and `lengths` both say what is padding"):
        raw.table(1)


def test_an_output_processor_needs_a_packed_batch() -> None:
    with refused("output_processor gets the hidden states of a packed batch"):
        RawBatch(IDS, attention_mask=LEFT_AND_RIGHT).for_processor().table(1)


def test_padded_rows_are_divisible_over_the_context_parallel_ranks() -> None:
    with refused("under context parallelism of size 4 with S a multiple of 8, found [2, 4]"):
        RawBatch(IDS).table(4)
