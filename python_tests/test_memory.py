"""Memory that is used again: by whom, and when not."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import weight_compression as wc
from platonic_core.memory import _freed, recycled, release_recycled

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_kept():
    gc.collect()
    release_recycled()
    yield
    gc.collect()
    release_recycled()
    assert not _freed


def test_a_block_waits_for_the_last_view():
    shape = (3, MEGABYTE)
    first = recycled(shape, torch.float32)
    address, view = first.data_ptr(), first[1:]
    assert address % 64 == 0
    del first
    second = recycled(shape, torch.float32)
    assert second.data_ptr() != address, "a view still uses the block"
    del view
    assert recycled(shape, torch.float32).data_ptr() == address


def test_sizes_that_differ_by_little_share_a_block():
    addresses = {recycled([8 * MEGABYTE + extra], torch.uint8).data_ptr() for extra in (1, 1000, MEGABYTE // 2)}
    assert len(addresses) == 1
    assert recycled([10 * MEGABYTE], torch.uint8).shape == (10 * MEGABYTE,)
    assert len(_freed) == 2


def test_no_more_than_two_blocks_stay():
    tensors = [recycled([(4 + i) * MEGABYTE], torch.uint8) for i in range(6)]
    del tensors
    assert len(_freed) == 2
    small = recycled([1000], torch.float64)
    del small
    assert len(_freed) == 2


def test_threads_do_not_share_a_block():
    def use(number: int) -> None:
        for _ in range(100):
            block = recycled([4 * MEGABYTE], torch.uint8)
            block[::4096] = number
            wrong.append(int((block[::4096] != number).sum()))

    wrong: list[int] = []
    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 400 and not any(wrong)


def test_payloads_are_written_where_the_last_one_was():
    x = torch.randn(8 * MEGABYTE, generator=torch.Generator().manual_seed(0))
    first = wc.compress(x)
    address, kept = first.data_ptr(), first.clone()
    del first
    # A little more or less of everything, as the weights of the next step.
    second = wc.compress(x * 1.01 + 0.001)
    assert second.data_ptr() == address
    del second
    assert torch.equal(wc.compress(x), kept)
