"""Groups, exact escapes, planes of bytes and ratios on a CUDA device: the CPU's bytes and values."""

from __future__ import annotations

import pytest
import torch

import weight_compression as wc
from device_backend import Backend, check_equal, no_gpu, same_bits
from test_weight_codec import FLOATS, KINDS, draw
from weight_compression import _device_ops, _ops, codec, device, planes

OPTIONS = {
    "groups": {"group_size": 50},
    "clipped": {"clip_quantile": 0.9},
    "lossless": {"lossless": True},
    "ratio": {"ratio": 4.0},
}


def check_all(backend: Backend, x: torch.Tensor, **options) -> str:
    """check_equal, and adding to what is there."""
    config = wc.CompressionConfig(**options)
    mode = check_equal(backend, x, config)
    if x.dtype in FLOATS:
        payload, start = wc.compress(x, config), draw("normal", x.numel(), x.dtype, seed=5).view(x.shape)
        values, good = backend.decode(payload, start, accumulate=True, scale=-0.3)
        assert good and same_bits(values, wc.decompress(payload, start.clone(), accumulate=True, scale=-0.3))
    return mode


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kinds_of_values(options, dtype, backend):
    modes = set()
    for n, kind in enumerate(KINDS, start=1100):
        modes.add(check_all(backend, draw(kind, n, dtype), **options))
    for n in (1, 2, 17):
        check_all(backend, draw("laplace", n, dtype), **options)
    assert len(modes - {"raw"}) > 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_several_blocks(options, dtype, backend):
    for n in (65537,) if dtype != torch.float32 else (65536, 2 * 65536 + 4099):
        assert check_all(backend, draw("heavy", n, dtype, seed=n), **options) in ("entropy", "planes")


# ---- groups ----


@pytest.mark.parametrize(
    ("kind", "options", "mode"),
    [
        ("heavy", {"group_size": 16}, "entropy"),
        ("normal", {"group_size": 3000, "floor_bits": 2.0}, "entropy"),
        ("uniform", {"group_size": 10_002}, "fixed"),  # a last group of one value
        ("sparse", {"group_size": 5000, "floor_bits": 9.0}, "entropy"),  # several warps to a group
        ("sparse", {"group_size": 64, "bits": 12}, "entropy"),
        ("sparse", {"group_size": 64, "bits": 12.1}, "fixed"),
        ("heavy", {"group_size": 64, "max_error": 10.0}, "entropy"),
        ("normal", {"group_size": 64, "max_error": 1e-9}, "raw"),
        ("heavy", {"group_size": 64, "ratio": 6.0}, "entropy"),
        ("normal", {"group_size": 10_003}, "entropy"),  # as many as there are: one range
    ],
)
def test_groups(kind, options, mode, backend):
    assert check_all(backend, draw(kind, 10_003, torch.float32), **options) == mode


def test_channels(backend):
    x = draw("normal", 40 * 60, torch.float32).view(40, 4, 15) * torch.logspace(-3, 3, 40)[:, None, None]
    payload = wc.compress(x, wc.CompressionConfig(per_channel=True))
    assert not torch.equal(payload, wc.compress(x))
    for shape in ((40, 4, 15), (40, 60), (2400,), (240, 10), (1, 2400)):
        check_all(backend, x.view(shape), per_channel=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_groups_without_width(dtype, backend):
    steps = torch.tensor([1.0, -0.0, 0.0, -3.5, 2.0**-14]).to(dtype)
    assert check_all(backend, steps.repeat_interleave(16), group_size=16, bits=6) == "fixed"
    check_all(backend, steps.repeat_interleave(16), group_size=16, ratio=3.0)
    mixed = torch.cat([steps.repeat_interleave(100), draw("normal", 333, dtype)])
    check_all(backend, mixed, group_size=100)
    zeros = torch.tensor([0.0, -0.0] * 40 + [-0.0] * 16 + [1.0] * 20).to(dtype)
    check_all(backend, zeros, group_size=16)


def test_groups_of_extreme_values(backend):
    for dtype in FLOATS:
        for kind in ("denormal", "huge"):
            check_all(backend, torch.cat([draw(kind, 500, dtype), draw("normal", 500, dtype)]), group_size=100)


# ---- escapes ----


@pytest.mark.parametrize(
    ("kind", "options", "mode"),
    [
        ("heavy", {"clip_quantile": 0.999}, "entropy"),
        ("heavy", {"clip_quantile": 0.5, "bits": 3}, "entropy"),
        ("heavy", {"clip_quantile": 0.99, "bits": 13}, "fixed"),
        ("heavy", {"clip_quantile": 0.9, "max_error": 1.0}, "entropy"),
        ("normal", {"clip_quantile": 0.9, "max_error": 1e-9}, "raw"),
        ("heavy", {"clip_quantile": 0.98, "ratio": 4.0}, "entropy"),
        ("normal", {"clip_quantile": 0.999999}, "entropy"),  # nothing is cut off
        ("two", {"clip_quantile": 0.9}, "entropy"),
        ("sparse", {"clip_quantile": 0.9}, "entropy"),  # no width is left
    ],
)
def test_escapes(kind, options, mode, backend):
    assert check_all(backend, draw(kind, 10_003, torch.float32), **options) == mode


def test_clipping_that_does_not_pay(backend):
    x = draw("uniform", 10_003, torch.float16)
    clipped = wc.CompressionConfig(clip_quantile=0.5, bits=9)
    assert torch.equal(wc.compress(x, clipped), wc.compress(x, wc.CompressionConfig(bits=9)))
    assert check_all(backend, x, clip_quantile=0.5, bits=9) in ("fixed", "entropy")
    check_all(backend, x, clip_quantile=0.5, ratio=1.5)


def test_blocks_with_and_without_escapes(backend):
    x = draw("normal", 3 * 65536 + 900, torch.float32).clamp(-1, 1)
    x[65536 + 7 : 65536 + 4000] *= 50
    x[-1] = 1e30
    check_all(backend, x, clip_quantile=0.97)
    check_all(backend, x, clip_quantile=0.97, bits=13)


def test_escapes_of_zeros_and_denormals(backend):
    for dtype in FLOATS:
        x = torch.cat([draw("denormal", 2000, dtype), draw("normal", 60, dtype), torch.zeros(50).to(dtype)])
        x[::100] = -0.0
        check_all(backend, x, clip_quantile=0.9)


def test_codes_of_the_sample_with_options(backend, monkeypatch):
    monkeypatch.setattr(_ops.kernels, "sample_coded_from", 5000)
    x = draw("laplace", 120_000, torch.float32).clamp(-1, 1)
    for options in ({"clip_quantile": 0.98}, {"group_size": 1000}, {"clip_quantile": 0.6}, {"ratio": 6.0}):
        for more in ({}, {"sample_fraction": 0.9, "floor_bits": 3.0}):
            check_equal(backend, x, wc.CompressionConfig(**options, **more))


# ---- planes ----


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.bool, torch.int16, torch.uint16, torch.int32, torch.int64, torch.complex64, torch.complex128,
     torch.float8_e4m3fn],
    ids=str,
)  # fmt: skip
def test_planes_of_every_dtype(dtype, backend):
    modes = set()
    for n in (1, 2, 3000, 70_001):
        modes.add(
            check_equal(backend, (draw("normal", n, torch.float32) * 5).to(dtype), wc.CompressionConfig(lossless=True))
        )
    assert dtype == torch.bool or "planes" in modes


def test_planes_of_special_values(backend):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([0.0, -0.0, nan, inf, -inf, 1.0, 2.0, 1.0] * 500)
    assert check_equal(backend, x, wc.CompressionConfig(lossless=True)) == "planes"
    for value in (nan, -0.0, 1.0):
        assert check_equal(backend, torch.full((700,), value), wc.CompressionConfig(lossless=True)) == "constant"
    parts = torch.complex(torch.full((700,), 1.0), torch.full((700,), 2.0))
    assert check_equal(backend, parts, wc.CompressionConfig(lossless=True)) == "constant"
    parts[3] = 5
    assert check_equal(backend, parts, wc.CompressionConfig(lossless=True)) == "planes"
    assert check_equal(backend, torch.empty(0, 3), wc.CompressionConfig(lossless=True)) == "raw"


def test_planes_that_a_sample_gives_up(backend, monkeypatch):
    monkeypatch.setattr(planes, "SAMPLED", 4096)
    monkeypatch.setattr(_device_ops, "SAMPLED", 4096)
    x = draw("normal", 50_000, torch.float32)
    assert check_equal(backend, x, wc.CompressionConfig(lossless=True)) == "planes"
    # Between the runs of the sample, a plane that could be coded after all, and planes that differ only there.
    x[200:700] = 1.0
    check_equal(backend, x, wc.CompressionConfig(lossless=True))
    sampled = torch.ones(50_000, dtype=torch.int32)
    sampled[64:500] = torch.arange(436, dtype=torch.int32) * 70_001
    check_equal(backend, sampled, wc.CompressionConfig(lossless=True))


# ---- ratios ----


@pytest.mark.parametrize("ratio", [1.01, 2.5, 5.0, 7.3, 12.0, 31.0, 1e6])
def test_ratios(ratio, backend):
    for kind in ("laplace", "heavy", "two", "uniform"):
        check_equal(backend, draw(kind, 9_003, torch.float32), wc.CompressionConfig(ratio=ratio))
    check_equal(backend, draw("normal", 5_003, torch.float64), wc.CompressionConfig(ratio=ratio))


# ---- all of them ----


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_that_are_not_finite(options, backend):
    x = draw("heavy", 3000, torch.float32)
    x[1234] = float("nan")
    kept = wc.CompressionConfig(**options, nonfinite="raw")
    assert torch.equal(backend.compress(x, kept), wc.compress(x, kept))
    if not options.get("lossless"):
        assert backend.compress(x, wc.CompressionConfig(**options)) is None


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_views_and_memory_that_begin_anywhere(options, backend):
    x, config = draw("heavy", 3001, torch.float32), wc.CompressionConfig(**options)
    check_all(backend, x[1:], **options)
    check_all(backend, x.half()[3:], **options)
    for begin in (1, 2, 3):
        memory = torch.zeros(wc.compress_bound(len(x)) + begin, dtype=torch.uint8, device=backend.where)[begin:]
        size = int(device.compress_into(x.to(backend.where), (3001,), config, memory))
        assert torch.equal(memory[:size].cpu(), wc.compress(x, config)) and not memory[size:].any()
        out = torch.zeros(3002, device=backend.where)[1:]
        assert int(_device_ops.decompress(memory[:size], out, False, 1.0, True)) == 0
        assert torch.equal(out.cpu(), wc.decompress(memory[:size].cpu()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_order_of_threads_does_not_show(options, backend):
    if backend.kernels is None:
        pytest.skip("a GPU has its own order")
    backend.kernels.run_backwards(True)
    backend.kernels.at_end = False
    check_all(backend, draw("heavy", 65536 + 777, torch.float32), **options)
    check_all(backend, draw("uniform", 4001, torch.float64), **options)


def test_public_functions_take_the_options(backend):
    x = draw("heavy", 2000, torch.float32).view(20, 100)
    for options in (*OPTIONS.values(), {"per_channel": True}):
        payload = wc.compress(x, wc.CompressionConfig(**options)).to(backend.where)
        values = codec._decompress_on_device(payload, None, False, 1.0, 1 << 20, True)
        assert same_bits(values.cpu(), wc.decompress(payload.cpu()))


@no_gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cuda_options_never_wait_where_they_say_so(options):
    x, config = draw("heavy", 300_000, torch.float32), wc.CompressionConfig(**options)
    there, out = x.cuda(), torch.zeros(300_000, device="cuda")
    memory = torch.empty(wc.compress_bound(300_000, torch.float32, 1), dtype=torch.uint8, device="cuda")
    payload = wc.compress(x, config).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        size = wc.compress_into(there, memory, config)
        wc.decompress(payload, out, check=False)
        wc.decompress(payload, out, accumulate=True, check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(memory[: int(size)], payload)


@no_gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cuda_options_of_large_tensors(options, dtype):
    config = wc.CompressionConfig(**options)
    for kind in ("normal", "heavy"):
        x = draw(kind, 3_000_011, dtype)
        payload = wc.compress(x.cuda(), config)
        assert torch.equal(payload.cpu(), wc.compress(x, config))
        assert same_bits(wc.decompress(payload).cpu(), wc.decompress(payload.cpu()))
