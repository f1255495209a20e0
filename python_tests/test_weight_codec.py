"""compress and decompress against the slow reference, on every instruction set, and what they promise."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weight_compression as wc
from platonic_core import _C
from weight_compression import _ops, reference
from weight_compression.codec import _as_bytes
from weight_compression.payload import Mode, parse_header

ROOT = Path(__file__).resolve().parents[1]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ISAS = ["scalar", "avx2", "avx512"]
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


@pytest.fixture
def isa():
    """Lowers the instruction set for a test."""
    yield _C.limit_isa
    _C.limit_isa("")


def draw(kind: str, n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=g, dtype=torch.float64)
    values = {
        "normal": normal,
        "uniform": torch.rand(n, generator=g, dtype=torch.float64) * 3 - 1,
        "laplace": normal.sign() * torch.log1p(normal.abs()) * 2,
        "heavy": normal / (torch.rand(n, generator=g, dtype=torch.float64) + 0.01) ** 2,
        "two": (normal > 0).double() * 3 - 1,
        "sparse": normal * (normal.abs() > 2),
        "denormal": normal * SMALLEST[dtype] * 40,
        "huge": normal.clamp(-1, 1) * 0.99 * float(torch.finfo(dtype).max),
        "narrow": 1 + normal * 8 * UNIT[dtype],
        "shifted": 1000 + normal,
    }[kind]
    return values.to(dtype)


KINDS = ["normal", "uniform", "laplace", "heavy", "two", "sparse", "denormal", "huge", "narrow", "shifted"]


def within_bound(x: torch.Tensor, y: torch.Tensor, levels: int) -> bool:
    """|x - y| <= (hi - lo) / (2 K), but for the rounding of a few operations on numbers of the range's size."""
    lo, hi = float(x.double().min()), float(x.double().max())
    arithmetic = UNIT[torch.float64] if x.dtype == torch.float64 else UNIT[torch.float32]
    size = max(abs(lo), abs(hi))
    allowed = (hi / 2 - lo / 2) / levels + 8 * arithmetic * size + UNIT[x.dtype] * size + SMALLEST[x.dtype]
    return float((x.double() / 2 - y.double() / 2).abs().max()) <= allowed / 2


# ---- the reference, bit by bit ----


def reference_payload_parts(x: torch.Tensor, payload: torch.Tensor, floor_bits: float) -> None:
    """Checks a payload of mode entropy or fixed, field by field, against the reference."""
    data = _as_bytes(payload)
    header = parse_header(data)
    real = np.float64 if x.dtype == torch.float64 else np.float32
    values = x.reshape(-1).to(torch.float64 if real is np.float64 else torch.float32).numpy()
    lo, hi = float(values.min()) + 0.0, float(values.max()) + 0.0
    assert (header.scheme.lo, header.scheme.hi) == (lo, hi)
    sample = reference.quantize(values[reference.sample_indices(len(values), 0.03)], lo, hi, 16)
    entropy = reference.histogram_entropy(np.bincount(sample, minlength=16).tolist())
    assert header.entropy == np.float32(entropy)
    assert header.levels == reference.levels_of_bits(entropy + floor_bits)
    symbols = reference.quantize(values, lo, hi, header.levels)
    offset = header.data
    if header.mode == Mode.ENTROPY:
        counts = np.bincount(symbols, minlength=header.levels)
        lengths = reference.code_lengths(counts, _ops.kernels.length_limit(header.levels))
        np.testing.assert_array_equal(header.lengths.numpy(), lengths)
    for block, (size, checksum) in enumerate(header.table):
        stored = data[offset : offset + size].tobytes()
        part = symbols[block * 65536 : (block + 1) * 65536]
        if header.mode == Mode.ENTROPY:
            assert stored == reference.encode_block(part, lengths)
        else:
            bits = _ops.kernels.fixed_bits(header.levels)
            stream = (part[:, None] >> np.arange(bits) & 1).astype(np.uint8).ravel()
            assert stored == np.packbits(stream, bitorder="little").tobytes()
        assert _ops.crc32c(np.frombuffer(stored, np.uint8)) == checksum
        offset += int(size)
    expected = torch.from_numpy(reference.dequantize(symbols, lo, hi, header.levels, real)).to(x.dtype)
    assert torch.equal(wc.decompress(payload), expected.view(x.shape))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_payload_equals_reference(kind, dtype, name, isa):
    isa(name)
    x = draw(kind, 12_000, dtype)
    for floor_bits in (5.0, 6.0):
        payload = wc.compress(x, wc.CompressionConfig(floor_bits=floor_bits))
        if wc.payload_info(payload).mode in ("entropy", "fixed"):
            reference_payload_parts(x, payload, floor_bits)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("floor_bits", [2.0, 4.5, 5.0, 6.3, 8.0, 9.2, 13.0])
def test_every_number_of_tables_equals_reference(floor_bits, name, isa):
    # 2^(H + c) levels from about 10 to 60,000: every path of the row kernels, and fixed bits beyond 4,096.
    isa(name)
    reference_payload_parts(x := draw("laplace", 30_000, torch.float32), wc.compress(
        x, wc.CompressionConfig(floor_bits=floor_bits)), floor_bits)  # fmt: skip


def test_blocks_and_tails_equal_reference():
    # A block and a short one, with an incomplete last row.
    x = draw("normal", 65536 + 12345, torch.float32)
    reference_payload_parts(x, wc.compress(x), 5.0)


@pytest.mark.parametrize("n", [2, 3, 15, 16, 17, 31, 33, 1023, 1024, 1025, 65535, 65536, 65537, 131072, 3 * 65536 + 1,
                               4 * 65536, 5 * 65536 - 16, 9 * 65536 + 7])  # fmt: skip
@pytest.mark.parametrize("kind, levels", [("sparse", 3), ("normal", 200), ("heavy", 256), ("laplace", 300),
                                          ("heavy", 4096)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_same_bytes_and_values_on_every_isa_and_any_threads(n, kind, levels, dtype, isa):
    x = draw(kind, n, dtype, seed=n)
    # Forced into mode entropy, whichever would be smaller.
    lo, hi, _ = _ops.value_range(x)
    if lo == hi:
        x[0] = lo = lo - 1
    scheme = _ops.Scheme(lo=lo, hi=hi, levels=levels)
    lengths = _ops.code_lengths(_ops.symbol_counts(x, scheme))
    results = []
    for name in ISAS:
        for threads in (1, 3):
            isa(name)
            torch.set_num_threads(threads)
            out = torch.zeros(_ops.kernels.coded_bytes_bound(n, 14 * n), dtype=torch.uint8)
            size, table = _ops.encode_blocks(x, scheme, lengths, None, out)
            decoded = torch.empty_like(x)
            blocks = _ops.Blocks(out[:size].numpy(), table)
            status = _ops.decode_blocks(blocks, scheme, lengths, decoded, False, 1.0, True)
            assert status == (0, 0)
            results.append((out[:size], torch.from_numpy(table.astype(np.int64)), decoded))
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert within_bound(x, results[0][2], levels)


@pytest.mark.parametrize("n", [2, 300, 4097, 70_000, 5_000_000])
@pytest.mark.parametrize("floor_bits", [1.0, 5.0, 12.0])
def test_all_steps_at_once_give_what_they_give_one_by_one(n, floor_bits, monkeypatch):
    x = draw("laplace", n, torch.float32)
    configs = [wc.CompressionConfig(floor_bits=floor_bits, full_histogram=full) for full in (False, True)]
    at_once = [wc.compress(x, config) for config in configs]
    monkeypatch.setattr(_ops, "plan_by_entropy", lambda *_: None)
    for config, payload in zip(configs, at_once, strict=True):
        assert torch.equal(payload, wc.compress(x, config))


def test_range_and_counts_are_the_same_on_every_isa(isa):
    for dtype in FLOATS:
        x = draw("heavy", 100_003, dtype)
        found = []
        for name in ISAS:
            isa(name)
            lo, hi, finite = _ops.value_range(x)
            assert (lo, hi, finite) == (float(x.double().min()), float(x.double().max()), True)
            scheme = _ops.Scheme(lo=lo, hi=hi)
            found.append([_ops.symbol_counts(x, scheme.with_levels(k)) for k in (2, 63, 200, 256, 257, 5000, 65536)])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_reference_decodes_what_kernels_encode():
    x = draw("laplace", 20_000, torch.float32)
    payload = wc.compress(x)
    header = parse_header(_as_bytes(payload))
    block = _as_bytes(payload)[header.data :].tobytes()
    symbols = reference.decode_block(block, 20_000, header.lengths.numpy())
    expected = reference.dequantize(symbols, header.scheme.lo, header.scheme.hi, header.levels)
    np.testing.assert_array_equal(wc.decompress(payload).numpy(), expected)


# ---- what compress promises ----


@settings(max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(FLOATS),
    n=st.integers(1, 3000),
    floor_bits=st.floats(0, 16),
    entropy_bits=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_round_trip_within_bound(kind, dtype, n, floor_bits, entropy_bits, seed):
    x = draw(kind, n, dtype, seed)
    payload = wc.compress(x, wc.CompressionConfig(floor_bits=floor_bits, entropy_bits=entropy_bits))
    info = wc.payload_info(payload)
    y = wc.decompress(payload)
    assert (y.dtype, y.shape, info.bytes) == (x.dtype, x.shape, payload.numel())
    if info.levels:
        assert within_bound(x, y, info.levels)
    else:
        assert torch.equal(x, y)
    assert payload.numel() <= wc.compress_bound(n, dtype, 1)
    assert torch.equal(
        payload, wc.compress(x.clone(), wc.CompressionConfig(floor_bits=floor_bits, entropy_bits=entropy_bits))
    )


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4, 5), (1, 1, 7)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shapes(shape, dtype):
    x = draw("normal", math.prod(shape), dtype).view(shape)
    y = wc.decompress(wc.compress(x))
    assert y.shape == x.shape and y.dtype == dtype


def test_layouts_are_read_in_logical_order():
    x = torch.randn(60, 50)
    for view in (
        x.T,
        x[::2, 5:],
        x.flip(0),
        x[3].expand(4, 50),
        torch.randn(3, 8, 6, 6).to(memory_format=torch.channels_last),
    ):
        assert torch.equal(wc.compress(view), wc.compress(view.contiguous()))


def test_other_dtypes_are_exact():
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64):
        x = (torch.randn(1000) * 50).to(dtype)
        payload = wc.compress(x)
        assert wc.payload_info(payload).mode == "raw"
        assert torch.equal(wc.decompress(payload), x)


def test_conjugate_views_are_resolved():
    x = torch.randn(10, dtype=torch.complex64)
    assert torch.equal(wc.decompress(wc.compress(x.conj())), x.conj())


def test_constants_take_no_data():
    for value in (0.0, -0.0, 2.5, 1e-42):
        x = torch.full((1000, 1000), value)
        payload = wc.compress(x)
        assert payload.numel() < 64 and wc.payload_info(payload).mode == "constant"
        assert torch.equal(wc.decompress(payload), x)


@pytest.mark.parametrize("threads", [1, 2])
def test_flushing_denormals_elsewhere_changes_nothing(threads):
    x = draw("denormal", 300_000, torch.float32)
    payload = wc.compress(x)
    expected = wc.decompress(payload)
    torch.set_num_threads(threads)
    try:
        supported = torch.set_flush_denormal(True)
        again, decoded = wc.compress(x), wc.decompress(payload)
        still = float(torch.tensor(1e-40) * 1) == 0.0 or not supported
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(2)
    assert torch.equal(again, payload) and torch.equal(decoded.view(torch.int32), expected.view(torch.int32))
    assert still  # the caller's choice is left as it was


def test_a_pool_that_starts_while_denormals_are_flushed():
    # New threads begin with the floating-point mode of the thread that starts them.
    program = """if True:
        import torch, weight_compression as wc
        torch.set_num_threads(2)
        torch.set_flush_denormal(True)
        wc.compress(torch.arange(4_000_000))
        torch.set_flush_denormal(False)
        x = (torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)) * 3e-5).half()
        payloads = [wc.compress(x) for _ in range(4)]
        torch.set_num_threads(1)
        assert all(torch.equal(p, wc.compress(x)) for p in payloads)
        error = float((wc.decompress(payloads[0]).double() - x.double()).abs().max())
        assert error <= wc.payload_info(payloads[0]).error_bound + 2.0**-24, error
    """
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_flushed_float64_denormals_are_not_constant():
    x = torch.linspace(0, 1, 5000, dtype=torch.float64) * 1e-309
    payload = wc.compress(x)
    try:
        torch.set_flush_denormal(True)
        again, decoded = wc.compress(x), wc.decompress(payload)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(again, payload) and torch.equal(decoded, wc.decompress(payload))


def test_values_that_change_while_they_are_coded_do_not_overflow():
    # As another thread could: the room was measured for other values.
    x = draw("normal", 200_000, torch.float32)
    lo, hi, _ = _ops.value_range(x)
    scheme = _ops.Scheme(lo=lo, hi=hi, levels=200)
    lengths = _ops.code_lengths(_ops.symbol_counts(x, scheme))
    for isa in ISAS:
        _C.limit_isa(isa)
        for wild in (x, torch.full_like(x, float(x.max())), x * 1e30, torch.full_like(x, float("nan"))):
            out = torch.zeros(100_000 + 64, dtype=torch.uint8)
            assert _ops.encode_blocks(wild, scheme, lengths, None, out[:100_000])[0] == -1
            assert not out[100_000:].any()
            assert int(_ops.symbol_counts(wild, scheme).sum()) == x.numel()
    _C.limit_isa("")


def test_sign_of_zero_does_not_reach_the_header():
    # Which zero a minimum returns depends on the order of comparisons.
    a, b = torch.tensor([0.0, -0.0, 1.0] * 100), torch.tensor([-0.0, 0.0, 1.0] * 100)
    assert torch.equal(wc.compress(a), wc.compress(b))


def test_lossless_is_exact_even_with_nan():
    x = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.0])
    y = wc.decompress(wc.compress(x, wc.CompressionConfig(lossless=True)))
    assert torch.equal(x.view(torch.int32), y.view(torch.int32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 17, 70_000, 99_999])
def test_nonfinite(dtype, value, at, isa):
    x = draw("normal", 100_000, dtype)
    x[at] = value
    for name in ISAS:
        isa(name)
        with pytest.raises(wc.NonFiniteError, match="NaN or infinity"):
            wc.compress(x)
    y = wc.decompress(wc.compress(x, wc.CompressionConfig(nonfinite="raw")))
    assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_size_is_near_entropy():
    # The larger ones with the code of their sample.
    for kind, n in (("normal", 1_200_000), ("laplace", 1_200_000), ("uniform", 1_200_000), ("uniform", 1 << 22)):
        x = draw(kind, n, torch.float32)
        payload = wc.compress(x)
        header = parse_header(_as_bytes(payload))
        counts = _ops.symbol_counts(x, header.scheme).double()
        p = counts[counts > 0] / counts.sum()
        entropy = float(-(p * p.log2()).sum())
        assert 8 * payload.numel() / x.numel() <= 1.01 * entropy, kind


def test_size_is_that_of_the_code():
    # Below about two bits of entropy, prefix codes are more than 1 % away from it, but not payloads from the code.
    for kind in ("normal", "heavy", "two", "sparse"):
        x = draw(kind, 1_200_000, torch.float32)
        payload = wc.compress(x)
        header = parse_header(_as_bytes(payload))
        counts = _ops.symbol_counts(x, header.scheme)
        bits = int((counts * header.lengths).sum())
        assert 8 * payload.numel() <= bits + 8 * (19 * 96 + 19 * 8 + header.levels / 2 + 100), kind


def test_small_tensors_have_small_overhead():
    x = draw("normal", 500, torch.float32)
    payload = wc.compress(x)
    info = wc.payload_info(payload)
    assert payload.numel() < 200 + 500 * math.ceil(math.log2(info.levels)) / 8


# ---- decompress ----


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "two", "huge", "denormal"])
@pytest.mark.parametrize("floor_bits", [5.0, 8.0])  # symbols of 8 and of 16 bits
def test_accumulate_equals_decode_and_add(dtype, kind, floor_bits, isa):
    x = draw(kind, 70_001, dtype)
    payload = wc.compress(x, wc.CompressionConfig(floor_bits=floor_bits))
    start = draw("normal", 70_001, dtype, seed=1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (start.to(wide) + torch.tensor(0.3, dtype=wide) * wc.decompress(payload).to(wide)).to(dtype)
    for name in ISAS:
        isa(name)
        out = start.clone()
        assert wc.decompress(payload, out, accumulate=True, scale=0.3) is out
        assert torch.equal(out, expected)


def test_accumulate_of_raw_and_constant():
    out = torch.ones(5)
    wc.decompress(wc.compress(torch.full((5,), 2.0)), out, accumulate=True, scale=3.0)
    wc.decompress(wc.compress(torch.arange(5.0), wc.CompressionConfig(lossless=True)), out, accumulate=True)
    assert torch.equal(out, 7 + torch.arange(5.0))


def test_out_is_checked():
    payload = wc.compress(torch.randn(100, 20))
    with pytest.raises(wc.BadShapeError, match=r"expected shape \(100, 20\), got \(20, 100\)"):
        wc.decompress(payload, torch.empty(20, 100))
    with pytest.raises(TypeError, match=r"expected torch\.float32, got torch\.float64"):
        wc.decompress(payload, torch.empty(100, 20, dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous"):
        wc.decompress(payload, torch.empty(20, 100).T)
    with pytest.raises(ValueError, match="require grad"):
        wc.decompress(payload, torch.empty(100, 20, requires_grad=True))
    with pytest.raises(ValueError, match="expected out"):
        wc.decompress(payload, accumulate=True)
    with pytest.raises(TypeError, match="accumulate"):
        wc.decompress(wc.compress(torch.arange(4)), torch.zeros(4, dtype=torch.int64), accumulate=True)


def test_out_is_known_to_autograd():
    payload = wc.compress(torch.randn(100))
    w, x = torch.randn(100), torch.randn(100, requires_grad=True)
    y = (w * x).sum()
    wc.decompress(payload, w)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with pytest.raises(ValueError, match="lazy"):
        wc.decompress(payload, torch._neg_view(torch.zeros(100)))
    with pytest.raises(ValueError, match="scale"):
        wc.decompress(payload, scale=0.5)


def test_payload_from_bytes_and_arrays():
    payload = wc.compress(torch.randn(3000))
    expected = wc.decompress(payload)
    raw = payload.numpy().tobytes()
    for form in (raw, bytearray(raw), memoryview(raw), np.frombuffer(raw, np.uint8)):
        assert torch.equal(wc.decompress(form), expected)
    with pytest.raises(TypeError, match="uint8"):
        wc.decompress(payload.to(torch.int32))


def test_max_bytes_stops_bombs():
    bomb = wc.compress(torch.zeros(1).expand(1 << 20))
    with pytest.raises(wc.SizeLimitError, match="max_bytes = 1000"):
        wc.decompress(bomb, max_bytes=1000)


# ---- numbers that decide levels ----


@given(st.floats(1e-300, 1e300))
def test_exact_log2(x):
    assert _ops.kernels.exact_log2(x) == reference.exact_log2(x)
    assert _ops.kernels.exact_log2(x) == pytest.approx(math.log2(x), rel=1e-14, abs=1e-15)


@given(st.floats(-500, 500))
def test_exact_exp2(x):
    assert _ops.kernels.exact_exp2(x) == reference.exact_exp2(x)
    assert _ops.kernels.exact_exp2(x) == pytest.approx(2.0**x, rel=1e-13)


@given(st.integers(4097, 1 << 40), st.floats(1e-6, 1))
def test_sample_stays_inside(n, fraction):
    runs = _ops.kernels.sample_runs(n, fraction)
    assert 64 <= runs <= n // 64 and (runs - 1) * (n // runs) + 64 <= n


def test_estimate_entropy():
    assert wc.estimate_entropy(torch.full((10,), 3.0)) == 0.0
    assert wc.estimate_entropy(torch.rand(1_000_000)) == pytest.approx(4.0, abs=0.01)
    gaussian = torch.randn(2_000_000)
    counts = torch.histc(gaussian, 16, float(gaussian.min()), float(gaussian.max())).double() / gaussian.numel()
    full = float(-(counts[counts > 0] * counts[counts > 0].log2()).sum())
    assert wc.estimate_entropy(gaussian) == pytest.approx(full, abs=0.02)
    with pytest.raises(ValueError, match="empty"):
        wc.estimate_entropy(torch.empty(0))


def test_config_is_checked():
    for wrong in ({"floor_bits": -1}, {"entropy_bits": 0}, {"sample_fraction": 0}, {"bits": 0.5}, {"max_error": 0.0},
                  {"nonfinite": "ignore"}, {"bits": 4, "lossless": True}, {"ratio": 1.0}, {"gradient_rms": -1.0},
                  {"ratio": 3, "max_error": 1}):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            wc.CompressionConfig(**wrong)
    with pytest.raises(TypeError):
        wc.CompressionConfig(5.0)


def test_unsupported_tensors():
    with pytest.raises(TypeError, match="layout"):
        wc.compress(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match="expected one of"):
        wc.compress(torch.zeros(3, device="meta", dtype=torch.float8_e8m0fnu))
