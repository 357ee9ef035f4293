"""Reading rectangles out of files: any rectangle, strides, dtype and destination, against torch's own slicing."""

import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlbridge.checkpoint.stream import raw
from megatron_vlbridge.checkpoint.stream.engine import Block, Options
from megatron_vlbridge.checkpoint.stream.raw import Stored, as_bytes, read_exactly, write_exactly
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.weights import TensorSpec


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_rectangle_is_the_slice(tmp_path_factory, data):
    """Also where nothing but a few bytes may be held, so that every rectangle is halved many times."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), max_size=4)))
    order = data.draw(st.permutations(range(len(shape))))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64]))
    lead = data.draw(st.integers(0, 9))
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    laid = whole.permute(order).contiguous()  # as it lies in the file
    path = tmp_path_factory.mktemp("raw") / "numbers"
    path.write_bytes(bytes(lead) + bytes(as_bytes(laid)) + b"end")
    strides = tuple(laid.permute([order.index(dim) for dim in range(len(shape))]).stride())
    row_major = list(order) == sorted(order) and data.draw(st.booleans())
    stored = Stored(path, lead, TensorSpec(shape, dtype), None if row_major else strides)
    offset = tuple(data.draw(st.integers(0, extent - 1)) for extent in shape)
    size = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    into = data.draw(st.sampled_from([dtype, torch.float32]))
    out = torch.empty(size[::-1], dtype=into).permute(tuple(range(len(size) - 1, -1, -1)))
    if data.draw(st.booleans()):
        out = torch.empty(size, dtype=into)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw, "SPAN_BYTES", data.draw(st.sampled_from([1, 16, 2**22])))
        stored.read_into(offset, out)
    assert torch.equal(out, whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))].to(into))


def test_a_file_that_ends_early_is_an_error_and_no_numbers(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(bytes(15))
    with pytest.raises(OSError, match="ends at byte 15, 1 bytes too early"):
        Stored(path, 0, TensorSpec((4,), torch.float32)).read_into((0,), torch.empty(4))


@pytest.mark.parametrize("shape", [(3, 4), (), (0, 5), (12,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool])
def test_a_block_gives_the_same_memory_in_any_form(shape, dtype):
    block = Block(96, threading.Event())
    first, second = block.take(shape, dtype), block.take(shape, dtype)
    assert first.shape == shape
    assert first.dtype == dtype
    # torch copies a tensor that does not fill its storage before it saves it.
    assert first.untyped_storage().nbytes() == first.nbytes
    assert not first.numel() or first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("memory", [5 * 2**27, 2**30, 2**32])
def test_workers_are_as_many_as_the_memory_admits(memory):
    options, block = Options(workers=1000, memory=memory), 64 * 2**20
    threads = options.threads(block)
    assert options.needed(block, threads) <= memory < options.needed(block, threads + 1)
    assert Options(workers=2, memory=memory).threads(block) == 2


@pytest.mark.parametrize("options", [Options(workers=0), Options(workers=-1), Options(memory=2**26)])
def test_options_that_admit_no_worker_are_refused(options):
    with pytest.raises(VLBridgeError, match=r"(workers|memory): expected at least"):
        options.threads(64 * 2**20)


def test_short_reads_and_writes_are_continued(tmp_path, monkeypatch):
    """As on network file systems: each call moves a part of what it was asked for."""
    pread, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, part, place: pwrite(handle, part[: len(part) // 3 + 1], place))
    monkeypatch.setattr(os, "preadv", lambda handle, parts, place: pread(handle, [parts[0][:777]], place))
    numbers, found = torch.arange(5000), torch.empty(5000, dtype=torch.int64)
    handle = os.open(tmp_path / "numbers", os.O_RDWR | os.O_CREAT)
    try:
        write_exactly(handle, 13, as_bytes(numbers))
        read_exactly(handle, 13, found)
    finally:
        os.close(handle)
    assert torch.equal(found, numbers)
    assert (tmp_path / "numbers").read_bytes() == bytes(13) + bytes(as_bytes(numbers))
