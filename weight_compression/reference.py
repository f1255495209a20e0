"""The whole codec once more, slow and plain, in NumPy: what the kernels are held to, bit by bit.

Follows FORMAT.md, not the kernels. Algorithm numbers are those of chapter 3 of the thesis.
"""

from __future__ import annotations

import heapq
import math

import numpy as np

__all__ = [
    "code_lengths",
    "crc32c",
    "decode_block",
    "dequantize",
    "encode_block",
    "exact_exp2",
    "exact_log2",
    "histogram_entropy",
    "levels_of_bits",
    "make_dequantizer",
    "make_quantizer",
    "quantize",
    "sample_indices",
]

LANES = 16
_LIMITS = {4: (2.0**126, 2.0**-60, 2.0**64, 2.0**-23), 8: (2.0**1022, 2.0**-500, 2.0**512, 2.0**-52)}


def _scale(lo: float, hi: float, real: type) -> float:
    large, tiny, lift, _ = _LIMITS[np.dtype(real).itemsize]
    if hi >= large or lo <= -large:
        return 0.5
    return lift if hi - lo < tiny else 1.0


def make_quantizer(lo: float, hi: float, levels: int, real: type = np.float32) -> tuple:
    """(pre, low, factor) in the arithmetic `real`, float32 or float64."""
    pre = real(_scale(lo, hi, real))
    low = real(lo) * pre
    spread = real(hi) * pre - low
    factor = real(float(levels) / float(spread))
    while int(spread * factor) >= levels:
        factor = factor - factor * real(_LIMITS[np.dtype(real).itemsize][3])
    return pre, low, factor


def quantize(x: np.ndarray, lo: float, hi: float, levels: int) -> np.ndarray:
    """Bin numbers (algorithm 1, QUANTIZE, counted from the bottom) of float32 or float64 x."""
    pre, low, factor = make_quantizer(lo, hi, levels, x.dtype.type)
    return np.trunc((x * pre - low) * factor).astype(np.int64)


def make_dequantizer(lo: float, hi: float, levels: int, real: type = np.float32) -> tuple:
    """(first, step, post)."""
    scale = _scale(lo, hi, real)
    low = lo * scale
    step = (hi * scale - low) / levels
    return real(low + step * 0.5), real(step), real(1.0 / scale)


def dequantize(symbols: np.ndarray, lo: float, hi: float, levels: int, real: type = np.float32) -> np.ndarray:
    """Bin centres (algorithm 2, line 4)."""
    first, step, post = make_dequantizer(lo, hi, levels, real)
    return (first + step * symbols.astype(real)) * post


# ---- choice of the levels ----


def exact_log2(x: float) -> float:
    fraction, exponent = math.frexp(x)  # 0.5 <= fraction < 1
    m, e = fraction * 2.0, exponent - 1
    if m > 1.4142135623730951:
        m, e = m * 0.5, e + 1
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    total = 1.0 / 23.0
    for k in range(21, 0, -2):
        total = total * z + 1.0 / k
    return float(e) + total * s * 2.8853900817779268


def exact_exp2(x: float) -> float:
    n = int(x)
    if x - n > 0.5:
        n += 1
    if x - n < -0.5:
        n -= 1
    f = (x - n) * 0.69314718055994531
    total = 1.0
    for k in range(16, 0, -1):
        total = 1.0 + total * f / k
    return math.ldexp(total, n)


def histogram_entropy(counts: list[int]) -> float:
    total = 0.0
    for c in counts:
        if c > 0:
            total = total + float(c) * exact_log2(float(c))
    n = sum(counts)
    return max(0.0, exact_log2(float(n)) - total / float(n))


def levels_of_bits(bits: float) -> int:
    if not bits < 16.0:
        return 65536
    return 2 if bits < 1.0 else int(exact_exp2(bits) + 0.5)


def sample_indices(n: int, fraction: float) -> np.ndarray:
    """Elements that the entropy is estimated from."""
    if n <= 4096:
        return np.arange(n)
    runs = min(max(math.ceil(fraction * float(n) / 64.0), 64), n // 64)
    return (np.arange(runs)[:, None] * (n // runs) + np.arange(64)).ravel()


# ---- prefix codes ----


def code_lengths(counts: np.ndarray, limit: int) -> np.ndarray:
    """Package-merge by its definition: the 2 m - 2 lightest elements of the last of `limit` merged lists."""
    items = sorted((int(c), s) for s, c in enumerate(counts) if c > 0)
    lengths = np.zeros(len(counts), np.int64)
    merged: list[tuple[int, int, int, tuple]] = []
    for _ in range(limit):
        packages = [
            (a[0] + b[0], 1, i, a[3] + b[3]) for i, (a, b) in enumerate(zip(merged[::2], merged[1::2], strict=False))
        ]
        symbols = [(c, 0, i, (s,)) for i, (c, s) in enumerate(items)]
        merged = list(heapq.merge(symbols, packages))
    for element in merged[: 2 * len(items) - 2]:
        for symbol in element[3]:
            lengths[symbol] += 1
    return lengths


def canonical_codes(lengths: np.ndarray) -> dict[int, tuple[int, int]]:
    """{symbol: (code, length)}."""
    codes, code, previous = {}, 0, 0
    for length, symbol in sorted((int(n), s) for s, n in enumerate(lengths) if n > 0):
        code <<= length - previous
        codes[symbol] = (code, length)
        code, previous = code + 1, length
    return codes


def encode_block(symbols: np.ndarray, lengths: np.ndarray) -> bytes:
    """One block of mode 3, written backwards as FORMAT.md says."""
    codes = canonical_codes(lengths)
    value, fill = [0] * LANES, [16] * LANES
    words: list[int] = []
    for i in range(len(symbols) - 1, -1, -1):
        lane = i % LANES
        code, length = codes[int(symbols[i])]
        if fill[lane] + length >= 32:
            words.append(value[lane] & 0xFFFF)
            value[lane] >>= 16
            fill[lane] -= 16
        value[lane] |= code << fill[lane]
        fill[lane] += length
    states = np.array([v | 1 << f for v, f in zip(value, fill, strict=True)], "<u4")
    return states.tobytes() + np.array(words[::-1], "<u2").tobytes()


def decode_block(data: bytes, n: int, lengths: np.ndarray) -> np.ndarray:
    """The n symbols of a block of mode 3; ValueError if it does not follow the format."""
    symbol_of = {(length, code): symbol for symbol, (code, length) in canonical_codes(lengths).items()}
    states = [int(s) for s in np.frombuffer(data[: 4 * LANES], "<u4")]
    words = iter(int(w) for w in np.frombuffer(data[4 * LANES :], "<u2"))
    fill = [s.bit_length() - 1 for s in states]
    value = [s - (1 << f) for s, f in zip(states, fill, strict=True)]
    if min(fill) < 16:
        raise ValueError("a lane begins with fewer than 16 bits")
    symbols = np.empty(n, np.int64)
    for i in range(n):
        lane, length = i % LANES, 1
        while (length, value[lane] >> (fill[lane] - length)) not in symbol_of:
            length += 1
        symbols[i] = symbol_of[length, value[lane] >> (fill[lane] - length)]
        fill[lane] -= length
        value[lane] &= (1 << fill[lane]) - 1
        if fill[lane] < 16:
            value[lane] = value[lane] << 16 | next(words, -1)
            if value[lane] < 0:
                raise ValueError("words are missing")
            fill[lane] += 16
    if any(value) or any(f != 16 for f in fill) or next(words, None) is not None:
        raise ValueError("bits are left")
    return symbols


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
