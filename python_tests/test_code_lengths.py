"""Code lengths: optimal, complete, limited, and the same as the reference's."""

from __future__ import annotations

import heapq

import dahuffman
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weight_compression import _ops, reference


def huffman_bits(counts: list[int]) -> int:
    """Total bits of an unrestricted Huffman code: the sum of all inner nodes."""
    heap = [c for c in counts if c > 0]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        node = heapq.heappop(heap) + heapq.heappop(heap)
        total += node
        heapq.heappush(heap, node)
    return total


histograms = st.lists(
    st.one_of(st.just(0), st.integers(1, 50), st.integers(1, 10**12)), min_size=2, max_size=300
).filter(lambda counts: sum(c > 0 for c in counts) >= 2)


@given(histograms)
def test_lengths(counts):
    lengths = _ops.code_lengths(torch.tensor(counts))
    limit = _ops.kernels.length_limit(len(counts))
    used = [int(n) for n, c in zip(lengths, counts, strict=True) if c > 0]
    assert all(int(n) == 0 for n, c in zip(lengths, counts, strict=True) if c == 0)
    assert max(used) <= limit and sum(2.0**-n for n in used) == 1.0
    np.testing.assert_array_equal(lengths, reference.code_lengths(np.array(counts), limit))
    bits = sum(int(n) * c for n, c in zip(lengths, counts, strict=True))
    assert bits >= huffman_bits(counts)
    # Where an optimal code is short enough anyway, the limit costs nothing.
    unrestricted = reference.code_lengths(np.array(counts), 60)
    if unrestricted.max() <= limit:
        assert bits == huffman_bits(counts)


@given(histograms)
def test_as_good_as_dahuffman(counts):
    # dahuffman codes an end mark too: here it is one more symbol, at the frequency that it is given there.
    frequencies = {s: c for s, c in enumerate(counts) if c > 0}
    table = dahuffman.HuffmanCodec.from_frequencies(frequencies, eof=len(counts)).get_code_table()
    with_end = [*counts, 1]
    if max(length for length, _ in table.values()) > 13:
        return
    theirs = sum(with_end[s] * length for s, (length, _) in table.items())
    assert huffman_bits(with_end) == theirs
    lengths = _ops.code_lengths(torch.tensor(with_end))
    assert int((lengths * torch.tensor(with_end)).sum()) == theirs


def test_limit_binds():
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = _ops.code_lengths(torch.tensor(fibonacci))
    assert int(lengths.max()) == 13 and float((2.0 ** -lengths.double()).sum()) == 1.0
    many = torch.ones(4096, dtype=torch.int64)
    many[:40] = torch.tensor(fibonacci)
    assert int(_ops.code_lengths(many).max()) == 14


@given(st.lists(st.integers(0, 14), min_size=2, max_size=200))
def test_packed_lengths_come_back(lengths):
    tensor = torch.tensor(lengths, dtype=torch.uint8)
    packed = _ops.pack_lengths(tensor)
    assert len(packed) <= len(lengths) // 2 + 1
    out = torch.empty_like(tensor)
    assert _ops.kernels.unpack_lengths(packed, len(lengths), out.data_ptr())
    assert torch.equal(out, tensor)
    # Any other number of lengths or bytes is refused.
    more = torch.empty(len(lengths) + 40, dtype=torch.uint8)
    assert not _ops.kernels.unpack_lengths(packed + b"\0", len(lengths), more.data_ptr())
    assert not _ops.kernels.unpack_lengths(packed[:-1], len(lengths), more.data_ptr())


@given(st.binary(max_size=60), st.integers(2, 100))
def test_hostile_lengths(packed, levels):
    lengths = _ops.unpack_lengths(packed, levels)
    if lengths is not None:
        used = lengths[lengths > 0].double()
        assert float((2.0**-used).sum()) == 1.0 and int(lengths.max()) <= 14
        assert _ops.pack_lengths(lengths) is not None


def test_wrong_counts():
    for counts in (torch.tensor([5]), torch.tensor([5, 0]), torch.tensor([-1, 2, 3]), torch.ones(5000, dtype=torch.int64),
                   torch.tensor([1.0, 2.0])):  # fmt: skip
        with pytest.raises(ValueError, match="code_lengths: expected"):
            _ops.code_lengths(counts)


@given(st.binary(max_size=20_000))
def test_crc32c(data):
    array = np.frombuffer(data, np.uint8)
    if len(data) < 500:
        assert _ops.crc32c(array) == reference.crc32c(data)
    from platonic_core import _C

    found = set()
    for isa in ("scalar", "avx2", "avx512"):
        _C.limit_isa(isa)
        found.add(_ops.crc32c(array))
    _C.limit_isa("")
    assert len(found) == 1


def test_crc32c_check_value():
    assert _ops.crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    assert _ops.crc32c(np.empty(0, np.uint8)) == 0
