"""What CompressionConfig offers: rules for the levels, exact planes of bytes, ranges of groups, escapes, full histograms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import MaskedTensor

import weight_compression as wc
from platonic_core import _C
from test_weight_codec import draw
from weight_compression import _ops, reference
from weight_compression.codec import _as_bytes
from weight_compression.payload import DTYPES, Mode, PlaneKind, parse_header

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LOSSLESS = wc.CompressionConfig(lossless=True)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heavy(n: int, seed: int = 0) -> torch.Tensor:
    return gaussian(n, seed=seed) / gaussian(n, seed=seed + 1).abs().clamp_min(1e-3)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request):
    _C.limit_isa(request.param)
    yield request.param
    _C.limit_isa("")


# ---- rules for the number of levels ----


def test_max_error_and_bits():
    x = torch.randn(50_000)
    for error in (1.0, 0.1, 0.003):
        payload = wc.compress(x, wc.CompressionConfig(max_error=error))
        assert float((wc.decompress(payload) - x).abs().max()) <= error + 8 * 2.0**-24 * float(x.abs().max())
        assert wc.payload_info(payload).error_bound <= error
    assert torch.equal(wc.decompress(wc.compress(x, wc.CompressionConfig(max_error=1e-9))), x)
    assert wc.payload_info(wc.compress(x, wc.CompressionConfig(bits=8))).levels == 256


@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "sparse", "two", "heavy"])
@pytest.mark.parametrize("ratio", [3.0, 4.0, 6.5, 10.0, 100.0])
def test_ratio(kind, ratio):
    x = draw(kind, 60_000, torch.float32)
    payload = wc.compress(x, wc.CompressionConfig(ratio=ratio))
    header = parse_header(_as_bytes(payload))
    counts = _ops.symbol_counts(x, header.scheme)
    bits = float((counts * _ops.code_lengths(counts)).sum()) / x.numel()
    wanted = 32 / ratio
    assert bits <= wanted or header.levels == 2
    if header.levels < 3200:  # as many levels as fit, about
        counts = _ops.symbol_counts(x, header.scheme.with_levels(header.levels * 5 // 4 + 1))
        assert float((counts * _ops.code_lengths(counts)).sum()) / x.numel() > 0.985 * wanted


def test_gradient_rule():
    x = torch.randn(10_000)
    for rms, levels in ((0.0, 256), (1.0, 512), (0.5, 384)):
        config = wc.CompressionConfig(gradient_rms=rms, floor_bits=8)
        assert wc.payload_info(wc.compress(x, config)).levels == levels


OPTIONS = [{}, {"per_channel": True}, {"group_size": 64}, {"clip_quantile": 0.98}]
RULES = [{}, {"ratio": 6.0}, {"max_error": 0.05}, {"gradient_rms": 0.3}, {"bits": 3.3}]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_rule_with_every_range(rule, option, isa):
    config = wc.CompressionConfig(**rule, **option)
    tensors = {
        "normal": gaussian(60, 150),
        "channels": gaussian(60, 150) * torch.logspace(-3, 0, 60)[:, None],
        "constant channels": torch.arange(60.0).repeat_interleave(150).view(60, 150),
        "thin": gaussian(3000, 1),
        "few kinds": torch.randint(0, 5, (150,), generator=torch.Generator().manual_seed(0)),
        "heavy": heavy(9000).view(60, 150).clamp(-1e4, 1e4),
    }
    for name, values in tensors.items():
        x = values.float()
        payload = wc.compress(x, config)
        info = wc.payload_info(payload)
        y = wc.decompress(payload)
        assert float((x - y).abs().max()) <= info.error_bound + 2.0**-20 * float(x.abs().max()), name
        assert payload.numel() <= wc.compress_bound(x.numel(), x.dtype, x.ndim)
        if "max_error" in rule:
            assert float((x - y).abs().max()) <= 0.05 + 2.0**-20 * float(x.abs().max()), name
        if "ratio" in rule and info.levels > 2:
            # Headers' fixed parts and the ends of lanes come on top.
            assert 8 * payload.numel() <= 32 / 6 * x.numel() + 8 * (16 * 4 + 8 + 80) + 16 * 32, name
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(wc.compress(x, config), payload), name
        torch.set_num_threads(2)


def test_ratio_counts_all_values():
    x = gaussian(1 << 22).clamp(-4, 4).float()
    scheme = parse_header(_as_bytes(wc.compress(x, wc.CompressionConfig(bits=math.log2(150))))).scheme
    counts = _ops.symbol_counts(x, scheme)
    wanted = float((counts * _ops.code_lengths(counts)).sum()) / x.numel() * 1.00001
    payload = wc.compress(x, wc.CompressionConfig(ratio=32 / wanted))
    header = parse_header(_as_bytes(payload))
    counts = _ops.symbol_counts(x, header.scheme)
    assert float((counts * header.lengths).sum()) / x.numel() <= wanted


def test_options_that_would_cost_more_than_they_save_are_not_taken():
    thin = gaussian(4000, 2).float()
    assert torch.equal(wc.compress(thin, wc.CompressionConfig(per_channel=True)), wc.compress(thin))
    half = gaussian(20_000).half()
    assert torch.equal(wc.compress(half, wc.CompressionConfig(clip_quantile=0.5)), wc.compress(half))
    rows = torch.arange(100.0).repeat_interleave(1000).view(100, 1000)
    exact = wc.compress(rows, wc.CompressionConfig(per_channel=True))
    assert torch.equal(wc.decompress(exact), rows) and wc.payload_info(exact).levels == 2


def test_errors_do_not_depend_on_flushed_denormals():
    x = gaussian(40, 300).float() * 1e-40
    config = wc.CompressionConfig(per_channel=True, max_error=5e-42)
    exact = wc.compress(x, wc.CompressionConfig(lossless=True))
    start = torch.full((40, 300), 1e-42)
    payload, summed = wc.compress(x, config), wc.decompress(exact, start.clone(), accumulate=True)
    bound = wc.payload_info(payload).error_bound
    torch.set_flush_denormal(True)
    try:
        again, added = wc.compress(x, config), wc.decompress(exact, start.clone(), accumulate=True)
        bound_again = wc.payload_info(payload).error_bound
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(payload, again) and torch.equal(summed.view(torch.int32), added.view(torch.int32))
    assert bound == bound_again > 0


# ---- lossless ----


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_planes_are_those_of_the_format(dtype, isa):
    x = gaussian(66_001).to(dtype)
    data = _as_bytes(wc.compress(x, LOSSLESS))
    header = parse_header(data)
    assert header.mode == Mode.PLANES and header.planes[0].kind == PlaneKind.CODED
    width, unsigned = dtype.itemsize, f"<u{dtype.itemsize}"
    units = x.view(BITS[width]).numpy().view(unsigned)
    rotated = units << np.array(1, unsigned) | units >> np.array(8 * width - 1, unsigned)
    at, row = header.data, 0
    for p, plane in enumerate(header.planes):
        symbols = (rotated >> np.array(8 * (width - 1 - p), unsigned)).astype(np.uint8)
        if plane.kind == PlaneKind.CODED:
            lengths = reference.code_lengths(np.bincount(symbols, minlength=256), 13)
            np.testing.assert_array_equal(plane.lengths.numpy(), lengths)
        for block in (symbols[:65536], symbols[65536:]):
            stored = data[at : at + header.table[row, 0]].tobytes()
            expected = reference.encode_block(block, lengths) if plane.kind == PlaneKind.CODED else block.tobytes()
            assert stored == expected
            assert header.table[row, 1] == _ops.crc32c(np.frombuffer(stored, np.uint8))
            at, row = at + len(stored), row + 1
    assert at == len(data)
    assert same_bits(wc.decompress(data), x)


@settings(max_examples=80)
@given(
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 3000),
    bits=st.integers(0, 8),
    seed=st.integers(0, 2**31),
)
def test_lossless_keeps_every_bit(dtype, n, bits, seed):
    # Bytes with few values each, so that planes differ in kind; NaN and infinities among them.
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 1 << bits, n * dtype.itemsize).astype(np.uint8)
    x = torch.tensor(raw % 2 if dtype == torch.bool else raw, dtype=torch.uint8).view(dtype)
    payload = wc.compress(x, LOSSLESS)
    assert payload.numel() <= wc.compress_bound(n, dtype, 1)
    assert same_bits(wc.decompress(payload), x)


@pytest.mark.parametrize("n", [65535, 65536, 65537, 4 * 65536 + 3, 5 * 65536])
def test_planes_of_several_blocks(n, isa):
    for x in (gaussian(n).bfloat16(), torch.arange(n), gaussian(n).float(), gaussian(n).to(torch.complex64)):
        assert same_bits(wc.decompress(wc.compress(x, LOSSLESS)), x)


def test_lossless_saves_what_exponents_do_not_use():
    x = gaussian(300_000) * 0.02
    bits = {t: wc.payload_info(wc.compress(x.to(t), LOSSLESS)).bits_per_weight for t in FLOATS}
    assert bits[torch.bfloat16] < 10.7 and bits[torch.float16] < 13.6 and bits[torch.float32] < 26.7
    # Values of bfloat16 in float32: a plane of zeros costs nothing, but the sign's own plane some headers.
    wide = wc.compress(x.bfloat16().float(), LOSSLESS)
    assert abs(wc.payload_info(wide).bits_per_weight - bits[torch.bfloat16]) < 0.03
    # Random bytes: raw.
    noise = torch.randint(0, 256, (50_000,), dtype=torch.uint8)
    assert wc.payload_info(wc.compress(noise, LOSSLESS)).mode == "raw"


def test_planes_are_the_same_with_any_threads():
    x = gaussian(700_000).float()
    payloads = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        payloads.append(wc.compress(x, LOSSLESS))
        assert same_bits(wc.decompress(payloads[-1]), x)
    torch.set_num_threads(2)
    assert torch.equal(*payloads)


def test_accumulate_of_planes():
    x, out = gaussian(70_000).bfloat16(), torch.ones(70_000, dtype=torch.bfloat16)
    wc.decompress(wc.compress(x, LOSSLESS), out, accumulate=True, scale=0.5)
    assert torch.equal(out, (1 + 0.5 * x.float()).bfloat16())


# ---- ranges of groups ----


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [16, 100, 4096, 70_000])
def test_groups_equal_reference(dtype, size, isa):
    x = (gaussian(71_234) * torch.logspace(-3, 0, 71_234, dtype=torch.float64)).to(dtype)
    x[200:400] = 0.25  # groups without width
    payload = wc.compress(x, wc.CompressionConfig(group_size=size, floor_bits=4))
    header = parse_header(_as_bytes(payload))
    real = np.float64 if dtype == torch.float64 else np.float32
    values = x.to(torch.float64 if real is np.float64 else torch.float32).numpy()
    counts, decoded = np.zeros(header.levels, np.int64), np.empty_like(values)
    for begin in range(0, len(values), size):
        part = values[begin : begin + size]
        lo, hi = float(part.min()), float(part.max())
        symbols = reference.quantize(part, lo, hi, header.levels) if lo < hi else np.zeros(len(part), np.int64)
        counts += np.bincount(symbols, minlength=header.levels)
        decoded[begin : begin + size] = reference.dequantize(symbols, lo, hi, header.levels, real) if lo < hi else part
    assert torch.equal(_ops.symbol_counts(x, header.scheme), torch.from_numpy(counts))
    assert torch.equal(wc.decompress(payload), torch.from_numpy(decoded).to(dtype))
    out = torch.ones(71_234, dtype=dtype)
    wc.decompress(payload, out, accumulate=True, scale=2.0)
    wide = torch.float64 if real is np.float64 else torch.float32
    expected = (1 + 2 * torch.from_numpy(decoded).to(dtype).to(wide)).to(dtype)
    assert torch.equal(out, expected)


def test_groups_of_extreme_ranges(isa):
    for dtype in FLOATS:
        tiny, most = float(torch.finfo(dtype).smallest_normal), float(torch.finfo(dtype).max)
        rows = [gaussian(100).clamp(-1, 1) * scale for scale in (1.0, tiny / 8, most)]
        x = torch.stack([*rows, torch.full((100,), most, dtype=torch.float64)]).to(dtype)
        payload = wc.compress(x, wc.CompressionConfig(per_channel=True, bits=10))
        y = wc.decompress(payload)
        assert bool(y.isfinite().all()) and torch.equal(y[3], x[3])
        for a, b in zip(x.double(), y.double(), strict=True):
            width = a.max() / 2 - a.min() / 2
            allowed = width / 1024 + torch.finfo(dtype).eps * a.abs().max() + tiny * torch.finfo(dtype).eps
            assert (a / 2 - b / 2).abs().max() <= allowed / 2


def test_per_channel_keeps_small_channels():
    scales = torch.logspace(-4, 0, 64)[:, None]
    x = gaussian(64, 2000).float() * scales
    errors = {}
    for per_channel in (False, True):
        payload = wc.compress(x, wc.CompressionConfig(per_channel=per_channel))
        errors[per_channel] = ((wc.decompress(payload) - x) / scales).abs().max()
    assert errors[True] < 0.03 and errors[False] > 1
    # One range where there are no channels, or one.
    for flat in (x[0], x[:1]):
        assert torch.equal(wc.compress(flat, wc.CompressionConfig(per_channel=True)), wc.compress(flat))


def test_error_bound_is_that_of_the_widest_group():
    x = torch.cat([gaussian(1000) * 0.01, gaussian(1000)]).float()
    payload = wc.compress(x, wc.CompressionConfig(group_size=1000, bits=8))
    bound = wc.payload_info(payload).error_bound
    assert bound == pytest.approx(float(x[1000:].max() - x[1000:].min()) / 512)
    assert float((wc.decompress(payload) - x).abs().max()) <= bound * 1.0001
    tight = wc.compress(x, wc.CompressionConfig(group_size=1000, max_error=0.01))
    assert float((wc.decompress(tight) - x).abs().max()) <= 0.01


# ---- escapes ----


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [None, 10.0])
@pytest.mark.parametrize("n", [600, 70_001])
def test_escapes_are_exact_and_the_rest_within_bound(dtype, bits, n, isa):
    x = heavy(n).clamp(-3e4, 3e4).to(dtype)
    payload = wc.compress(x, wc.CompressionConfig(clip_quantile=0.98, bits=bits))
    header = parse_header(_as_bytes(payload))
    lo, hi = header.scheme.lo, header.scheme.hi
    outside = (x.double() < lo) | (x.double() > hi)
    assert 0 < int(outside.sum()) < 0.04 * n and int(header.escapes.sum()) == int(outside.sum())
    y = wc.decompress(payload)
    assert torch.equal(y[outside], x[outside])
    # A value on the edge of the range is rounded to the dtype's next beyond it.
    bound = wc.payload_info(payload).error_bound + 2 * torch.finfo(dtype).eps * max(-lo, hi)
    assert float((x.double() - y.double())[~outside].abs().max()) <= bound
    start = gaussian(n, seed=5).to(dtype)
    out = start.clone()
    wc.decompress(payload, out, accumulate=True, scale=0.25)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(out, (start.to(wide) + 0.25 * y.to(wide)).to(dtype))


def test_escapes_follow_the_codes_of_their_block():
    x = heavy(66_000).float()
    data = _as_bytes(wc.compress(x, wc.CompressionConfig(clip_quantile=0.99)))
    header = parse_header(data)
    scheme, at = header.scheme, header.data
    clipped = x.clamp(scheme.lo, scheme.hi).numpy()
    symbols = reference.quantize(clipped, scheme.lo, scheme.hi, scheme.levels)
    for b, (size, _) in enumerate(header.table):
        part = x.numpy()[b * 65536 : (b + 1) * 65536]
        positions = np.flatnonzero((part < scheme.lo) | (part > scheme.hi))
        expected = reference.encode_block(symbols[b * 65536 : (b + 1) * 65536], header.lengths.numpy())
        expected += positions.astype("<u2").tobytes() + part[positions].tobytes()
        assert data[at : at + size].tobytes() == expected and header.escapes[b] == len(positions)
        at += size


def test_clipping_helps_heavy_tails():
    x = heavy(200_000).float()
    plain, clipped = wc.compress(x), wc.compress(x, wc.CompressionConfig(clip_quantile=0.999))
    assert wc.payload_info(clipped).error_bound < wc.payload_info(plain).error_bound / 3


def test_clipping_without_width_or_outliers_changes_nothing():
    sparse = torch.where(gaussian(50_000) > 3, gaussian(50_000), 0.0).float()
    two = (gaussian(10_000) > 0).float()
    for x in (sparse, two, gaussian(100).float()):
        payload = wc.compress(x, wc.CompressionConfig(clip_quantile=0.99))
        assert payload.numel() <= wc.compress_bound(x.numel(), x.dtype, 1)
        y = wc.decompress(payload)
        assert float((x - y).abs().max()) <= wc.payload_info(payload).error_bound * 1.001


def test_clipped_range_does_not_depend_on_flushed_denormals():
    x = heavy(20_000).float() * 1e-42
    config = wc.CompressionConfig(clip_quantile=0.99)
    payload = wc.compress(x, config)
    decoded = wc.decompress(payload)
    torch.set_flush_denormal(True)
    try:
        again, y = wc.compress(x, config), wc.decompress(payload)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(payload, again) and torch.equal(decoded.view(torch.int32), y.view(torch.int32))


# ---- hostile input ----


def reseal(data: bytearray, end: int) -> bytes:
    data[end - 4 : end] = _ops.crc32c(np.frombuffer(bytes(data[: end - 4]), np.uint8)).to_bytes(4, "little")
    return bytes(data)


def test_escapes_are_checked(isa):
    payload = wc.compress(heavy(3000), wc.CompressionConfig(clip_quantile=0.9))
    data = bytearray(payload.numpy().tobytes())
    header = parse_header(_as_bytes(payload))
    count = int(header.escapes[0])
    positions = len(data) - 10 * count
    for wrong in ([5, 5], [9, 3], [2999, 3000]):
        mutated = bytearray(data)
        mutated[positions : positions + 4] = np.array(wrong, "<u2").tobytes()
        for accumulate in (False, True):
            out = torch.zeros(3000, dtype=torch.float64)
            with pytest.raises(wc.BadCodeError):
                wc.decompress(bytes(mutated), out, accumulate=accumulate, check=False)
    for wrong_count in (count + 1, count - 1, 65536, 65537, 2**32 - 1):
        mutated = bytearray(data)
        mutated[header.data - 8 : header.data - 4] = wrong_count.to_bytes(4, "little")
        with pytest.raises(wc.PayloadError):
            wc.decompress(reseal(mutated, header.data), check=False)


def test_planes_are_not_all_constant():
    # A few bytes that say so could make a reader allocate for as many elements as they like.
    planes = wc.compress(torch.arange(300), LOSSLESS).numpy().tobytes()
    start = bytearray(planes[:24])
    start[8:16], start[16:24] = (60).to_bytes(8, "little"), (1 << 40).to_bytes(8, "little")
    bomb = bytes(start) + b"\1\0\0\0" * 8
    with pytest.raises(wc.BadHeaderError, match="not constant"):
        wc.payload_info(reseal(bytearray(bomb + b"\0\0\0\0"), 60))


def test_ranges_of_groups_are_checked():
    payload = wc.compress(gaussian(40, 100).float(), wc.CompressionConfig(per_channel=True))
    header = parse_header(_as_bytes(payload))
    ranges = header.data - 4 - 8 - 40 * 8
    for wrong in ([np.nan, 1.0], [0.0, np.inf], [2.0, 1.0], [-0.0, 1.0]):
        mutated = bytearray(payload.numpy().tobytes())
        mutated[ranges : ranges + 8] = np.array(wrong, "<f4").tobytes()
        with pytest.raises(wc.BadHeaderError, match="groups"):
            wc.decompress(reseal(mutated, header.data))
    for size in (0, 4000, 2**63):
        mutated = bytearray(payload.numpy().tobytes())
        mutated[ranges - 8 : ranges] = size.to_bytes(8, "little")
        with pytest.raises(wc.BadHeaderError, match="groups"):
            wc.decompress(reseal(mutated, header.data))


def test_options_are_checked():
    for wrong in ({"group_size": 8}, {"group_size": 2.5}, {"clip_quantile": 1.0}, {"clip_quantile": 0.3},
                  {"group_size": 64, "per_channel": True}, {"clip_quantile": 0.9, "per_channel": True},
                  {"lossless": True, "clip_quantile": 0.9}, {"gradient_rms": 0.0, "bits": 4},
                  {"gradient_rms": 0.0, "lossless": True}):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            wc.CompressionConfig(**wrong)


# ---- codes of the sample ----


def test_code_of_the_sample_costs_less_than_a_thousandth(isa):
    x = gaussian(1 << 22).clamp(-3, 3).float()
    payloads = [wc.compress(x, wc.CompressionConfig(full_histogram=full)) for full in (False, True)]
    assert 1 <= payloads[0].numel() / payloads[1].numel() < 1.001
    a, b = (parse_header(_as_bytes(p)) for p in payloads)
    sample = _ops.range_and_sample(x, 0.03)[3]
    np.testing.assert_array_equal(sample.numpy(), x.numpy()[reference.sample_indices(len(x), 0.03)])
    counts = torch.bincount(torch.from_numpy(reference.quantize(sample.numpy(), a.scheme.lo, a.scheme.hi, a.levels)))
    counts = torch.nn.functional.pad(counts, (0, a.levels - len(counts)))
    assert torch.equal(a.lengths, _ops.code_lengths(64 * counts + 1)) and not torch.equal(a.lengths, b.lengths)
    assert a.scheme == b.scheme and torch.equal(*(wc.decompress(p) for p in payloads))


def test_code_of_the_sample_is_not_taken_where_it_tells_too_little():
    big = 1 << 22
    for x in (heavy(big).float(), (gaussian(big) > 0).float() * gaussian(big).float().clamp(-1, 1)):
        full = wc.compress(x, wc.CompressionConfig(full_histogram=True))
        assert wc.compress(x).numel() <= 1.001 * full.numel()
    # Where runs of the sample are nothing like the rest, the code turns out too long, and that of all values is taken.
    x = torch.rand(1 << 22)
    x[reference.sample_indices(1 << 22, 0.03)] = 0.5 + 0.001 * torch.rand(len(reference.sample_indices(1 << 22, 0.03)))
    config = wc.CompressionConfig(bits=8)
    full = wc.compress(x, wc.CompressionConfig(bits=8, full_histogram=True))
    assert torch.equal(wc.compress(x, config), full)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lossless": True},
        {"ratio": 6.0},
        {"bits": 4.0},
        {"max_error": 0.01},
        {"clip_quantile": 0.9},
        {"group_size": 64},
    ],
    ids=str,
)
def test_another_default_device_changes_nothing(config, tmp_path):
    x = torch.randn(40, 500)
    expected = wc.compress(x, wc.CompressionConfig(**config))
    wc.save_file({"x": x}, tmp_path / "x.wcz")
    with torch.device("meta"):
        payload = wc.compress(x, wc.CompressionConfig(**config))
        assert torch.equal(payload, expected)
        assert torch.equal(wc.decompress(payload), wc.decompress(expected))
        assert wc.payload_info(payload).shape == (40, 500)
        assert wc.load_file(tmp_path / "x.wcz")["x"].device.type == "cpu"


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_tensors_without_memory_of_their_own():
    with FakeTensorMode():
        fake = torch.randn(50, 50)
    out = torch.zeros(50, 50)
    masked = MaskedTensor(torch.ones(3), torch.ones(3, dtype=torch.bool))
    freed = torch.ones(50)
    freed.untyped_storage().resize_(0)
    for tensor in (fake, torch._efficientzerotensor(50), masked, freed):
        with pytest.raises(TypeError, match="expected a"):
            wc.compress(tensor)
    with pytest.raises(TypeError, match="memory of its own"):
        torch.vmap(lambda row: wc.compress(row).sum())(out)
    with pytest.raises(TypeError, match="out: expected a tensor with memory of its own, got FakeTensor"):
        wc.decompress(wc.compress(out), fake)
    for wrong in ([1.0], np.zeros(3)):
        with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got"):
            wc.compress(wrong)
        with pytest.raises(TypeError, match=r"out: expected a torch\.Tensor"):
            wc.decompress(wc.compress(out), wrong)
    with pytest.raises(TypeError, match="config: expected a CompressionConfig, got dict"):
        wc.compress(out, {"bits": 4})


def test_options_of_wrong_types():
    for name in ("lossless", "per_channel", "full_histogram"):
        with pytest.raises(ValueError, match=f"{name}: expected True or False, got 'no'"):
            wc.CompressionConfig(**{name: "no"})
    with pytest.raises(ValueError, match="bits: expected a number, got '4'"):
        wc.CompressionConfig(bits="4")
    assert wc.CompressionConfig(group_size=np.int64(64)) == wc.CompressionConfig(group_size=64)
    with pytest.raises(ValueError, match=r"^bits: expected a whole number from 1 to 12, got 20"):
        wc.estimate_entropy(torch.randn(9), bits=20)
