"""Damaged and hostile payloads: every corruption is found, by its own error, and nothing else happens."""

from __future__ import annotations

import hashlib
import struct
import warnings

import numpy as np
import pytest
import torch

import weight_compression as wc
from platonic_core import _C
from weight_compression import _ops
from weight_compression.codec import _as_bytes
from weight_compression.payload import Mode, parse_header


def gaussian(n: int = 20_000) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


def samples() -> dict[str, bytes]:
    """A payload of every mode."""
    tensors = {
        "entropy": (gaussian(), wc.CompressionConfig()),
        "two blocks": (gaussian(70_000).view(700, 100), wc.CompressionConfig()),
        "fixed": (gaussian(500), wc.CompressionConfig(bits=9.3)),
        "constant": (torch.full((3, 4), 2.0), wc.CompressionConfig()),
        "raw": (torch.arange(300), wc.CompressionConfig()),
        "empty": (torch.empty(0, 3), wc.CompressionConfig()),
        "planes": (gaussian(66_000).bfloat16(), wc.CompressionConfig(lossless=True)),
        "groups": (gaussian(4000).view(40, 100), wc.CompressionConfig(per_channel=True)),
        "escapes": (gaussian(67_000) ** 3, wc.CompressionConfig(clip_quantile=0.99)),
        "fixed escapes": (gaussian(600).double(), wc.CompressionConfig(bits=10, clip_quantile=0.95)),
    }
    return {name: wc.compress(x, config).numpy().tobytes() for name, (x, config) in tensors.items()}


SAMPLES = samples()


def reseal(data: bytes) -> bytes:
    """The payload with its header's checksum made right again, as an attacker would."""
    header_end = parse_header_end(data)
    body = data[: header_end - 4]
    return body + struct.pack("<I", _ops.crc32c(np.frombuffer(body, np.uint8))) + data[header_end:]


def parse_header_end(data: bytes) -> int:
    """Where the data begin, from the original of a mutated payload of the same layout."""
    return parse_header(np.frombuffer(SAMPLES_BY_SIZE[len(data)], np.uint8)).data


SAMPLES_BY_SIZE = {len(data): data for data in SAMPLES.values()}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_single_bit_is_covered(name):
    data = np.frombuffer(SAMPLES[name], np.uint8)
    rng = np.random.default_rng(0)
    header = parse_header(data)
    places = range(header.data) if header.data < 400 else [*range(60), *rng.integers(60, header.data, 200)]
    places = [*places, *rng.integers(header.data, len(data), 100)] if len(data) > header.data else [*places]
    for place in places:
        mutated = data.copy()
        mutated[place] ^= 1 << rng.integers(8)
        with pytest.raises(wc.PayloadError):
            wc.decompress(mutated)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_truncation_and_extension_is_found(name):
    data = SAMPLES[name]
    for end in {*range(min(len(data), 300)), len(data) // 2, len(data) - 1}:
        with pytest.raises(wc.TruncatedError):
            wc.decompress(data[:end])
    with pytest.raises(wc.TruncatedError):
        wc.decompress(data + b"\0")


def field(name: str, offset: int, form: str, value: object) -> bytes:
    data = bytearray(SAMPLES[name])
    struct.pack_into("<" + form, data, offset, value)
    return bytes(data)


def test_each_fault_has_its_error():
    with pytest.raises(wc.BadMagicError, match="PLWC"):
        wc.decompress(b"\x1f\x8b" + SAMPLES["entropy"][2:])
    with pytest.raises(wc.UnsupportedVersionError, match="version 0, got 9"):
        wc.decompress(field("entropy", 4, "B", 9))
    with pytest.raises(wc.BadHeaderError, match="mode"):
        wc.decompress(field("entropy", 5, "B", 9))
    with pytest.raises(wc.BadHeaderError, match="dtype"):
        wc.decompress(field("entropy", 6, "B", 200))
    with pytest.raises(wc.BadShapeError, match="dimensions"):
        wc.decompress(field("entropy", 7, "B", 65))
    with pytest.raises(wc.TruncatedError):
        wc.decompress(field("entropy", 8, "Q", 1 << 60))
    with pytest.raises(wc.BadShapeError, match="elements"):
        wc.decompress(field("entropy", 16, "Q", 1 << 41))
    with pytest.raises(wc.BadChecksumError, match="header"):
        wc.decompress(field("entropy", 24, "d", -7.5))
    block = bytearray(SAMPLES["entropy"])
    block[-1] ^= 255
    with pytest.raises(wc.BadChecksumError, match="block 0"):
        wc.decompress(bytes(block))


@pytest.mark.parametrize(
    ("offset", "form", "value", "error"),
    [
        (24, "d", float("nan"), wc.BadHeaderError),
        (24, "d", float("inf"), wc.BadHeaderError),
        (24, "d", 1e300, wc.BadHeaderError),
        (24, "d", 0.1, wc.BadHeaderError),  # not a float32
        (32, "d", -100.0, wc.BadHeaderError),
        (40, "I", 1, wc.BadHeaderError),
        (40, "I", 5000, wc.BadHeaderError),
        (44, "f", float("nan"), wc.BadHeaderError),
        (50, "H", 1, wc.PayloadError),
        (50, "H", 3, wc.BadHeaderError),
        (40, "I", 100, wc.BadCodeError),
        (52, "I", 0x11111111, wc.BadCodeError),
        (52, "I", 0xFFFFFFFF, wc.BadCodeError),
    ],
)
def test_resealed_headers_are_checked_field_by_field(offset, form, value, error):
    with pytest.raises(error):
        wc.decompress(reseal(field("entropy", offset, form, value)))


def test_resealed_block_sizes_are_checked():
    header = parse_header(np.frombuffer(SAMPLES["two blocks"], np.uint8))
    table = header.data - 4 - 16
    sizes = [int(s) for s in header.table[:, 0]]
    for wrong in ([0, sum(sizes)], [sizes[0] + 1, sizes[1] - 1], [sizes[0] + 2, sizes[1]], [2**32 - 2, sizes[1] + 4]):
        data = bytearray(SAMPLES["two blocks"])
        struct.pack_into("<I", data, table, wrong[0] % 2**32)
        struct.pack_into("<I", data, table + 8, wrong[1] % 2**32)
        with pytest.raises(wc.BadOffsetError):
            wc.decompress(reseal(bytes(data)))
    # Sizes that add up, but cut the blocks at another place.
    data = bytearray(SAMPLES["two blocks"])
    struct.pack_into("<I", data, table, sizes[0] - 2)
    struct.pack_into("<I", data, table + 8, sizes[1] + 2)
    with pytest.raises(wc.BadCodeError):
        wc.decompress(reseal(bytes(data)), check=False)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("name", ["entropy", "two blocks", "fixed", "planes", "groups", "escapes", "fixed escapes"])
def test_any_block_bytes_are_safe_without_checksums(name, isa):
    """The decoder by itself: arbitrary bits give values or BadCodeError, never anything else."""
    _C.limit_isa(isa)
    rng = np.random.default_rng(1)
    data = np.frombuffer(SAMPLES[name], np.uint8)
    start = parse_header(data).data
    outcomes = set()
    for trial in range(150):
        mutated = data.copy()
        if trial % 3 == 0:
            mutated[start:] = rng.integers(0, 256, len(data) - start)
        elif trial % 3 == 1:
            mutated[start:] = rng.choice([0, 255])
        else:
            at = rng.integers(start, len(data), 5)
            mutated[at] ^= rng.integers(1, 256, 5).astype(np.uint8)
        info = wc.payload_info(data)
        out = torch.full(info.shape, float("nan"), dtype=info.dtype)
        try:
            wc.decompress(mutated, out, check=False)
            outcomes.add("decoded")
            # Values that are stored exactly may be anything.
            assert not out.isnan().any() or name in ("planes", "escapes", "fixed escapes")
        except wc.BadCodeError:
            outcomes.add("refused")
    _C.limit_isa("")
    assert "refused" in outcomes or name == "fixed"


def test_mutations_that_are_resealed_never_surprise():
    """Headers with right checksums and wrong contents: a PayloadError, or a tensor within max_bytes."""
    rng = np.random.default_rng(2)
    for data in SAMPLES.values():
        start = parse_header(np.frombuffer(data, np.uint8)).data
        for _ in range(300):
            mutated = bytearray(data)
            for at in rng.integers(0, start - 4, rng.integers(1, 4)):
                mutated[at] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    tensor = wc.decompress(reseal(bytes(mutated)), max_bytes=1 << 20, check=bool(rng.integers(2)))
                assert tensor.numel() * tensor.element_size() <= 1 << 20
            except wc.PayloadError:
                pass


def test_accumulate_leaves_out_alone_when_a_checksum_is_wrong():
    data = np.frombuffer(SAMPLES["two blocks"], np.uint8).copy()
    data[-1] ^= 1
    out = torch.ones(700, 100)
    with pytest.raises(wc.BadChecksumError, match="block 1"):
        wc.decompress(data, out, accumulate=True)
    assert torch.equal(out, torch.ones(700, 100))


# ---- golden bytes: changing any of these means a new format version ----

GOLDEN_CONSTANT = "504c574300010001200000000000000003000000000000000000c0bfb4824018"
GOLDEN_DIGESTS = {  # first 16 digits of SHA-256
    "entropy": "51e4f981e72c6c88",
    "entropy, float64": "e5efc1ebe862d68d",
    "entropy, bfloat16": "573e1a2d6f2a3fdf",
    "fixed": "a1b34ac79bb7ae94",
    "constant": "7b477101793f703a",
    "raw": "8d2cc28b0ee5456d",
    "entropy, groups": "f9c33ab17b62a19c",
    "entropy, escapes": "b93c7e15b2c7a0be",
    "planes": "ee20f20bbf2a355b",
    "fixed, groups": "23fad133ec723447",
    "fixed, escapes": "10f3cdd36ebbea76",
}


def golden_values() -> torch.Tensor:
    """Exact in float32, whatever computes it: a triangular distribution on a grid."""
    i = torch.arange(4000, dtype=torch.int64)
    return ((i * 7919 % 4001 + i * 104729 % 4001 - 4000).to(torch.float32)) / 1024


def test_golden_bytes():
    payloads = {
        "entropy": wc.compress(golden_values(), wc.CompressionConfig(floor_bits=3.0)),
        "entropy, float64": wc.compress(golden_values().double(), wc.CompressionConfig(floor_bits=4.0)),
        "entropy, bfloat16": wc.compress(golden_values().bfloat16(), wc.CompressionConfig(floor_bits=3.0)),
        "fixed": wc.compress(golden_values()[:100], wc.CompressionConfig(bits=5.5)),
        "constant": wc.compress(torch.full((3,), -1.5)),
        "raw": wc.compress(torch.arange(10, dtype=torch.int16)),
        "entropy, groups": wc.compress(golden_values().view(40, 100), wc.CompressionConfig(per_channel=True)),
        "entropy, escapes": wc.compress(
            golden_values() * golden_values() * golden_values(), wc.CompressionConfig(floor_bits=3.0, clip_quantile=0.9)
        ),
        "planes": wc.compress(golden_values(), wc.CompressionConfig(lossless=True)),
        "fixed, groups": wc.compress(golden_values()[:400], wc.CompressionConfig(group_size=100, bits=5.5)),
        "fixed, escapes": wc.compress(golden_values()[:400], wc.CompressionConfig(clip_quantile=0.9, bits=9.5)),
    }
    assert {name: wc.payload_info(p).mode for name, p in payloads.items()} == {
        name: name.split(",")[0] for name in payloads
    }
    found = {name: hashlib.sha256(p.numpy().tobytes()).hexdigest()[:16] for name, p in payloads.items()}
    assert payloads["constant"].numpy().tobytes().hex() == GOLDEN_CONSTANT
    assert found == GOLDEN_DIGESTS


def test_modes_of_samples():
    assert [parse_header(_as_bytes(SAMPLES[n])).mode for n in ("entropy", "fixed", "constant", "raw")] == [
        Mode.ENTROPY, Mode.FIXED, Mode.CONSTANT, Mode.RAW]  # fmt: skip
