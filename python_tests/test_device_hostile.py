"""Damaged and hostile payloads on a CUDA device: refused exactly where the CPU refuses them, whatever is in them."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

import weight_compression as wc
from device_backend import PAYLOADS, agree, payload_of, reseal
from test_weight_codec import draw
from weight_compression.payload import Mode, parse_header


@pytest.mark.parametrize("kind", PAYLOADS)
def test_every_part_is_covered(kind, backend):
    data, rng, n = payload_of(kind, 3000, torch.float32), np.random.default_rng(0), 3000
    header = parse_header(data.numpy()).data
    places = {*range(0, 60, 3), *rng.integers(0, header, 20), *rng.integers(header - 1, len(data), 10)}
    start = draw("normal", n, torch.float32, seed=2)
    for place in sorted(int(p) for p in places if p < len(data)):
        broken = data.clone()
        broken[place] ^= 1 << int(rng.integers(8))
        values, good = backend.decode(broken, start, accumulate=True)
        assert not good and torch.equal(values, start), place
    for end in (0, 3, 15, 16, 20, 51, 52, 60, header - 1, header, len(data) - 1):
        assert not backend.decode(data[: min(end, len(data) - 1)], start)[1]
    assert not backend.decode(torch.cat([data, data[:1]]), start)[1]


def test_other_tensors_are_refused(backend):
    payload = wc.compress(draw("laplace", 600, torch.float32).view(20, 30))
    for out in (torch.ones(600), torch.ones(30, 20), torch.ones(20, 30, dtype=torch.float64), torch.ones(20, 30, 1)):
        values, good = backend.decode(payload, out, check=False)
        assert not good and torch.equal(values, out)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in PAYLOADS if kind not in ("raw", "constant")])
def test_hostile_payloads_are_safe_without_checksums(kind, at_end, backend):
    if backend.kernels is not None:
        backend.kernels.at_end = at_end
    n, rng = 2500, np.random.default_rng(at_end)
    like = torch.empty(n)
    data = payload_of(kind, n, torch.float32).numpy().copy()
    header = parse_header(data).data
    good = 0
    for _ in range(25):  # blocks of anything
        broken = data.copy()
        places = rng.integers(header, len(data), rng.integers(1, 50))
        broken[places] = rng.integers(0, 256, len(places))
        good += agree(backend, torch.from_numpy(broken), like, False)
    for _ in range(40):  # headers of anything, sealed
        broken = data.copy()
        places = rng.integers(24, header - 4, rng.integers(1, 4))
        broken[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
        good += agree(backend, reseal(broken, header), like, False)
    everything = data.copy()
    everything[header:] = 255
    agree(backend, torch.from_numpy(everything), like, False)


def test_hostile_code_lengths(backend):
    x = draw("sparse", 2500, torch.float32)
    data = wc.compress(x, wc.CompressionConfig(floor_bits=9.0)).numpy().copy()
    parsed, rng = parse_header(data), np.random.default_rng(3)
    size = struct.unpack_from("<H", data, 48)[0]
    assert parsed.mode == Mode.ENTROPY and size > 20
    packs = [np.full(size, 0xFF), np.zeros(size), np.full(size, 0x11), np.full(size, 0xEE), np.full(size, 0x0F)]
    packs += [rng.integers(0, 256, size) for _ in range(5)]
    for _ in range(40):  # an escape more or less, a number that is one
        pack = data[52 : 52 + size].copy()
        place = rng.integers(0, size)
        pack[place] = rng.choice([0xFF, 0xF0, 0x0F, pack[place] ^ 0x10, pack[place] ^ 0x01])
        packs.append(pack)
    for pack in packs:
        broken = data.copy()
        broken[52 : 52 + size] = pack
        agree(backend, reseal(broken, parsed.data), x, False)
    for field, offset in (("I", 40), ("H", 48)):  # levels, bytes of the lengths
        for value in (0, 1, 2, 3, size - 1, size + 1, 2 * size, 4095, 4096, 4097, 65535):
            broken = data.copy()
            struct.pack_into("<" + field, broken, offset, value)
            agree(backend, reseal(broken, parsed.data), x, False)


def test_hostile_block_tables(backend):
    x = draw("laplace", 65536 + 500, torch.float32)
    data = wc.compress(x).numpy().copy()
    parsed = parse_header(data)
    a, b = (int(s) for s in parsed.table[:, 0])
    table = parsed.data - 4 - 16
    for sizes in ((a - 2, b + 2), (a + 2, b - 2), (a + b - 64, 64), (64, a + b - 64), (a + 1, b - 1), (0, a + b),
                  (2**32 - 2, a + b + 2), (b, a)):  # fmt: skip
        broken = data.copy()
        struct.pack_into("<I", broken, table, sizes[0])
        struct.pack_into("<I", broken, table + 8, sizes[1] % 2**32)
        assert not agree(backend, reseal(broken, parsed.data), x, False)


def packed(field: str, *values) -> np.ndarray:
    return np.frombuffer(struct.pack("<" + field, *values), np.uint8)


def with_bytes(data: np.ndarray, place: int, value: np.ndarray) -> np.ndarray:
    broken = data.copy()
    broken[place : place + len(value)] = value
    return broken


@pytest.mark.parametrize("kind", ["coded groups", "fixed groups"])
def test_hostile_groups(kind, backend):
    n = 2500
    like, data = torch.empty(n), payload_of(kind, n, torch.float32).numpy().copy()
    parsed = parse_header(data)
    size, groups = parsed.scheme.group_size, len(parsed.scheme.ranges)
    at = 52 + struct.unpack_from("<H", data, 48)[0]
    assert struct.unpack_from("<Q", data, at) == (size,)
    for value in (0, 1, size - 1, size + 1, n - 1, n, n + 1, 1 << 40, 1 << 63, 2**64 - 1):
        agree(backend, reseal(with_bytes(data, at, packed("Q", value)), parsed.data), like, False)
    nan, inf, largest = float("nan"), float("inf"), float(torch.finfo(torch.float32).max)
    kept = 0
    for lo, hi in ((nan, 1), (0, nan), (-inf, 1), (0, inf), (1, 0), (-0.0, 1), (-1, -0.0), (0, 0), (1, 1), (1e-45, 2e-45),
                   (-largest, largest), (-1e-45, 0), (largest, largest)):  # fmt: skip
        for group in (0, 1, groups - 1):
            broken = with_bytes(data, at + 8 + 8 * group, packed("ff", lo, hi))
            kept += agree(backend, reseal(broken, parsed.data), like, False)
    assert kept == 3 * 6
    for flags in (0, 2, 3, 4, 0x101):
        assert not agree(backend, reseal(with_bytes(data, 50, packed("H", flags)), parsed.data), like, False)


@pytest.mark.parametrize("kind", ["coded escapes", "fixed escapes"])
def test_hostile_escapes(kind, backend):
    n = 65536 + 1000
    like, data = torch.empty(n), payload_of(kind, n, torch.float32).numpy().copy()
    parsed = parse_header(data)
    first, last = (int(count) for count in parsed.escapes)
    sizes = parsed.table[:, 0].astype(np.int64)
    ends = parsed.data + sizes.cumsum()
    positions = ends - 6 * parsed.escapes.astype(np.int64)
    assert min(first, last) > 20
    kept = 0
    for block, count in ((0, first), (1, last)):
        begin = int(positions[block])
        stored = data[begin : begin + 2 * count].view("<u2").copy()
        for at, value in ((0, stored[1]), (1, stored[0]), (5, stored[4]), (count - 1, 65535), (count - 1, stored[-2]),
                          (3, stored[3] + 1), (7, 65535), (count - 1, 1000), (count - 1, 999)):  # fmt: skip
            broken = with_bytes(data, begin + 2 * at, packed("H", value))
            kept += agree(backend, torch.from_numpy(broken), like, False)
        for places in (stored[::-1], np.sort(stored)[::-1], np.zeros_like(stored), np.arange(count, dtype="<u2")):
            broken = with_bytes(data, begin, np.ascontiguousarray(places).view(np.uint8))
            kept += agree(backend, torch.from_numpy(broken), like, False)
    assert kept > 3
    table = parsed.data - 4 - 24
    for counts in ((first + 1, last), (first - 1, last), (0, last), (first, 0), (65536, last), (65537, last),
                   (2**32 - 1, last), (last, first), (first, last - 2)):  # fmt: skip
        broken = data.copy()
        struct.pack_into("<I", broken, table + 8, counts[0])
        struct.pack_into("<I", broken, table + 20, counts[1])
        agree(backend, reseal(broken, parsed.data), like, False)
    for flags in (0, 1, 3):
        assert not agree(backend, reseal(with_bytes(data, 50, packed("H", flags)), parsed.data), like, False)


def test_a_block_of_nothing_but_escapes(backend):
    # Two levels of a last block of one value, and as many positions as the table may say, all of them the same.
    x = draw("heavy", 65537, torch.float32)
    data = wc.compress(x, wc.CompressionConfig(clip_quantile=0.9)).numpy().copy()
    parsed = parse_header(data)
    end = parsed.data + int(parsed.table[0, 0])
    table = parsed.data - 4 - 12
    for count in (1, 2, 65536):
        grown = np.concatenate([data[: end + 64], np.zeros(6 * count, np.uint8)])
        struct.pack_into("<I", grown, table, 64 + 6 * count)
        struct.pack_into("<I", grown, table + 8, count)
        struct.pack_into("<Q", grown, 8, len(grown))
        assert agree(backend, reseal(grown, parsed.data), x, False) == (count == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64], ids=str)
def test_hostile_planes(dtype, backend):
    n = 3001
    x = (draw("normal", n, torch.float32) * 50).to(dtype)
    data = wc.compress(x, wc.CompressionConfig(lossless=True)).numpy().copy()
    parsed = parse_header(data)
    assert parsed.mode == Mode.PLANES
    width, rng, kept = len(parsed.planes), np.random.default_rng(0), 0
    for plane in range(width):
        at = 24 + 4 * plane
        old = data[at : at + 4].copy()
        for kind, value, length_bytes in ((0, 0, 0), (1, 0, 0), (1, 77, 0), (2, 0, 1), (3, 0, 0), (0, 1, 0), (2, 1, 5),
                                          (2, 0, 65535), (1, 0, 1), (0, 0, 1)):  # fmt: skip
            broken = with_bytes(data, at, packed("BBH", kind, value, length_bytes))
            agree(backend, reseal(broken, parsed.data), x, False)
        if old[0] == 1:
            kept += agree(backend, reseal(with_bytes(data, at + 1, packed("B", 99)), parsed.data), x, False)
    lengths = 24 + 4 * width
    table = parsed.data - 4 - 8 * len(parsed.table)
    for _ in range(30):
        place = int(rng.integers(lengths, table))
        agree(backend, reseal(with_bytes(data, place, packed("B", rng.integers(256))), parsed.data), x, False)
    for _ in range(20):
        row = int(rng.integers(len(parsed.table)))
        size = int(parsed.table[row, 0]) + int(rng.choice([-64, -2, -1, 1, 2, 64]))
        agree(backend, reseal(with_bytes(data, table + 8 * row, packed("I", size)), parsed.data), x, False)
    everything_constant = data.copy()
    everything_constant[24:lengths] = np.tile(packed("BBH", 1, 3, 0), width)
    assert not agree(backend, reseal(everything_constant, parsed.data), x, False)
    assert kept == sum(plane.kind == 1 for plane in parsed.planes)
