"""Mutates payloads and containers and decodes them: ``python benchmarks/fuzz_payloads.py [--count 1000000] [--seed 0]``.

Three kinds of damage, a third each: bits flipped anywhere (every one has to be found); headers rewritten with values
that are likely to hurt and their checksum made right again; block data overwritten and decoded without checksums. Each
must end in a PayloadError or a tensor of at most max_bytes. Every instruction set takes its turn. A crash or a hang of
the process, or any other exception, is a bug; the seed and the number of the mutation are printed with it.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
from collections import Counter

import numpy as np
import torch
from tqdm import trange

import weight_compression as wc
from platonic_core import _C
from weight_compression import _ops
from weight_compression.payload import parse_header

MAX_BYTES = 1 << 22
ISAS = ("scalar", "avx2", "avx512")


def make_samples() -> list[np.ndarray]:
    """Small payloads of every mode and dtype."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1500, generator=generator)
    samples = [wc.compress(normal.to(t), wc.CompressionConfig(floor_bits=2)) for t in _ops.DTYPE_CODES]
    samples += [wc.compress(normal.view(30, 50), wc.CompressionConfig(bits=b)) for b in (1, 3.3, 8, 9, 12)]
    samples.append(wc.compress(torch.randn(67_000, generator=generator), wc.CompressionConfig(floor_bits=1)))
    samples += [wc.compress(normal[:n]) for n in (0, 1, 2, 17)]
    exact = wc.CompressionConfig(lossless=True)
    samples += [wc.compress(normal.to(t), exact) for t in (*_ops.DTYPE_CODES, torch.int64, torch.complex64)]
    samples.append(wc.compress(torch.randn(66_000, generator=generator).bfloat16(), exact))
    for options in (
        {"per_channel": True},
        {"group_size": 16},
        {"clip_quantile": 0.9},
        {"clip_quantile": 0.8, "bits": 9},
    ):
        config = wc.CompressionConfig(floor_bits=3, **options)
        samples += [wc.compress(normal.view(30, 50).to(t), config) for t in _ops.DTYPE_CODES]
    samples += [wc.compress(torch.arange(100)), wc.compress(torch.ones(3, 4, 5, dtype=torch.bool))]
    return [payload.numpy().copy() for payload in samples]


def flip(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    data = data.copy()
    data[rng.integers(len(data))] ^= np.uint8(1 << rng.integers(8))
    return data


def rewrite_header(data: np.ndarray, start: int, rng: np.random.Generator) -> np.ndarray:
    data = data.copy()
    for at in rng.integers(4, max(5, start - 4), rng.integers(1, 6)):
        width = int(rng.choice([1, 2, 4, 8]))
        value = int(rng.choice([0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, int(rng.integers(1 << 32))]))
        end = min(at + width, start - 4)
        if end > at:
            data[at:end] = np.frombuffer(struct.pack("<Q", value), np.uint8)[: end - at]
    data[start - 4 : start] = np.frombuffer(struct.pack("<I", _ops.crc32c(data[: start - 4])), np.uint8)
    return data


def overwrite_blocks(data: np.ndarray, start: int, rng: np.random.Generator) -> np.ndarray:
    data = data.copy()
    size = len(data) - start
    if size > 0:
        length = int(rng.integers(1, size + 1)) if rng.random() < 0.5 else int(rng.integers(1, min(size, 80) + 1))
        at = start + int(rng.integers(0, size - length + 1))
        fill = rng.choice([0, 255, -1])
        data[at : at + length] = rng.integers(0, 256, length) if fill < 0 else fill
    return data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples = make_samples()
    starts = [parse_header(sample).data for sample in samples]
    rng = np.random.default_rng(options.seed)
    outcomes: Counter[str] = Counter()
    begin = time.perf_counter()
    for number in trange(options.count, unit="payload", disable=None):
        if number % 1000 == 0:
            _C.limit_isa(ISAS[number // 1000 % len(ISAS)])
        which, kind = int(rng.integers(len(samples))), number % 3
        original, start = samples[which], starts[which]
        if kind == 0:
            mutated = flip(original, rng)
        elif kind == 1:
            mutated = rewrite_header(original, start, rng)
        else:
            mutated = overwrite_blocks(original, start, rng)
        try:
            tensor = wc.decompress(mutated, max_bytes=MAX_BYTES, check=kind == 0)
            if kind == 0 or tensor.numel() * tensor.element_size() > MAX_BYTES:
                print(f"seed {options.seed}, mutation {number}: not found", file=sys.stderr)
                return 1
            # Into a given tensor, the usual kinds are read by C++: with the same values.
            again = wc.decompress(mutated, torch.empty_like(tensor), check=False)
            if tensor.flatten().view(torch.uint8).ne(again.flatten().view(torch.uint8)).any():
                print(f"seed {options.seed}, mutation {number}: other values into a given tensor", file=sys.stderr)
                return 1
            outcomes["decoded"] += 1
        except wc.PayloadError as error:
            outcomes[type(error).__name__] += 1
        except BaseException:
            print(f"seed {options.seed}, mutation {number}", file=sys.stderr)
            raise
    rate = options.count / (time.perf_counter() - begin)
    print(
        f"{options.count:,} mutated payloads, {rate:,.0f} a second: "
        + ", ".join(f"{k} {v:,}" for k, v in outcomes.most_common())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
