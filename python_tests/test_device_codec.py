"""The codec's CUDA kernels against the CPU's, byte for byte: on a GPU, and everywhere else the same sources on the CPU.

See cuda_emulation/ for how a .cu file runs without a GPU, and what is checked meanwhile.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import weight_compression as wc
from cuda_emulation import build as emulation
from device_backend import PAYLOADS, check_equal, no_gpu, payload_of, same_bits
from test_weight_codec import FLOATS, KINDS, draw
from weight_compression import _device_ops, _ops, codec, device, reference

SIZES = [1, 2, 15, 16, 17, 1000, 4097]
BLOCK_SIZES = [65535, 65536, 65537, 2 * 65536 + 4099]


# ---- the same bytes and values as the CPU ----


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_payloads_and_values_are_the_cpus(kind, dtype, backend):
    for n in SIZES:
        check_equal(backend, draw(kind, n, dtype, seed=n))


@pytest.mark.parametrize("n", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_blocks_and_tails(n, dtype, backend):
    # Laplace values get few enough levels to be coded.
    assert check_equal(backend, draw("laplace", n, dtype, seed=n)) == "entropy"


@pytest.mark.parametrize(
    ("kind", "options", "mode"),
    [
        ("laplace", {"floor_bits": 2.0}, "entropy"),
        ("laplace", {"floor_bits": 6.5}, "entropy"),  # more than 256 levels: symbols of two bytes
        ("heavy", {"bits": 12}, "entropy"),  # 4,096 levels, as many as are coded
        ("laplace", {"floor_bits": 9.5}, "fixed"),  # and more
        ("heavy", {"floor_bits": 11.3}, "entropy"),
        ("two", {"floor_bits": 5.0}, "entropy"),
        ("sparse", {"floor_bits": 10.0}, "entropy"),  # long runs of levels that do not occur
        ("uniform", {"floor_bits": 4.0}, "fixed"),
        ("uniform", {"floor_bits": 9.0}, "fixed"),
        ("normal", {"floor_bits": 12.0}, "fixed"),
        ("normal", {"bits": 16}, "fixed"),
        ("normal", {"bits": 1}, "fixed"),
        ("normal", {"max_error": 0.01}, "entropy"),
        ("normal", {"max_error": 1e-4}, "fixed"),
        ("normal", {"max_error": 1e-9}, "raw"),  # no number of levels is enough
        ("normal", {"max_error": 1e9}, "fixed"),
        ("normal", {"gradient_rms": 0.5, "floor_bits": 5.0}, "entropy"),
        ("normal", {"entropy_bits": 1}, "entropy"),
        ("normal", {"entropy_bits": 12, "floor_bits": 0.0}, "entropy"),
        ("normal", {"sample_fraction": 1.0}, "entropy"),
        ("normal", {"sample_fraction": 1e-6}, "entropy"),
    ],
)
def test_rules_and_modes(kind, options, mode, backend):
    found = check_equal(backend, draw(kind, 20_003, torch.float32), wc.CompressionConfig(**options))
    assert found == mode


def test_code_of_the_sample(backend, monkeypatch):
    monkeypatch.setattr(_ops.kernels, "sample_coded_from", 5000)
    enough = wc.CompressionConfig(sample_fraction=0.9, floor_bits=4)
    x = draw("laplace", 150_000, torch.float32).clamp(-1, 1)
    assert check_equal(backend, x, enough) == "entropy"
    with_all = wc.compress(x, wc.CompressionConfig(sample_fraction=0.9, floor_bits=4, full_histogram=True))
    assert not torch.equal(wc.compress(x, enough), with_all)
    # A sample that tells too little, fixed bits that are smaller, more levels than are coded.
    for kind, options in (("heavy", {}), ("normal", {"floor_bits": 11.0}), ("uniform", {"floor_bits": 4.0})):
        check_equal(backend, draw(kind, 20_003, torch.float32), wc.CompressionConfig(**options))
    # Values between the runs of the sample that are nothing like it: its code takes more than it may.
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    seen = reference.sample_indices(len(x), 0.4)
    x[seen] = (x[seen] < 0.5).float() * 0.1 + 0.3
    config = wc.CompressionConfig(bits=4, sample_fraction=0.4)
    assert torch.equal(wc.compress(x, config), wc.compress(x, dataclasses.replace(config, full_histogram=True)))
    check_equal(backend, x, config)


def test_constants_and_zeros(backend):
    for value in (0.0, -0.0, 2.5, 1e-42):
        assert check_equal(backend, torch.full((3, 700), value)) == "constant"
    a, b = torch.tensor([0.0, -0.0, 1.0] * 100), torch.tensor([-0.0, 0.0, 1.0] * 100)
    assert torch.equal(backend.compress(a), backend.compress(b))
    assert check_equal(backend, torch.tensor([0.0, -0.0])) == "constant"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite(value, dtype, backend):
    for n, at in ((1, 0), (9, 8), (9000, 0), (9000, 8998)):
        x = draw("normal", n, dtype)
        x[at] = value
        assert backend.compress(x) is None
        kept = wc.CompressionConfig(nonfinite="raw")
        payload = backend.compress(x, kept)
        assert torch.equal(payload, wc.compress(x, kept))
        values, good = backend.decode(payload, torch.zeros_like(x))
        assert good and same_bits(values, x)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4, 5), (1, 1, 7)])
def test_shapes(shape, backend):
    for dtype in (torch.float32, torch.bfloat16, torch.int16, torch.bool, torch.complex128):
        numel = int(np.prod(shape))
        check_equal(backend, (draw("normal", numel, torch.float64) * 50).to(dtype).view(shape))


def test_exact_dtypes(backend):
    for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        for n in (1, 5, 70_001):
            check_equal(backend, (draw("normal", n, torch.float32) * 50).to(dtype))


def test_views_that_begin_anywhere(backend):
    x = draw("laplace", 3001, torch.float32)
    for begin in range(1, 5):
        check_equal(backend, x[begin:])
        check_equal(backend, x.half()[begin:])
    for begin in range(1, 4):
        memory = torch.zeros(wc.compress_bound(len(x)) + begin, dtype=torch.uint8, device=backend.where)[begin:]
        size = device.compress_into(x.to(backend.where), (3001,), wc.CompressionConfig(), memory)
        payload = memory[: int(size)]
        assert torch.equal(payload.cpu(), wc.compress(x)) and not memory[int(size) :].any()
        out = torch.zeros(3002, device=backend.where)[1:]
        assert int(_device_ops.decompress(payload, out, False, 1.0, True)) == 0
        assert torch.equal(out.cpu(), wc.decompress(payload.cpu()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", PAYLOADS)
@pytest.mark.parametrize("check", [True, False])
def test_accumulate_is_the_cpus(kind, dtype, check, backend):
    n = 5003
    payload, start = payload_of(kind, n, dtype), draw("normal", n, dtype, seed=1)
    for scale in (1.0, -0.3):
        values, good = backend.decode(payload, start, accumulate=True, scale=scale, check=check)
        expected = wc.decompress(payload, start.clone(), accumulate=True, scale=scale)
        assert good and same_bits(values, expected)


# ---- what the order of threads may not change, and the emulation itself ----


def test_order_of_threads_does_not_show(backend):
    if backend.kernels is None:
        pytest.skip("a GPU has its own order")
    for kind, options in (("laplace", {}), ("heavy", {"floor_bits": 11.5}), ("uniform", {"floor_bits": 9.0})):
        x = draw(kind, 65536 + 777, torch.float32)
        backend.kernels.run_backwards(True)
        check_equal(backend, x, wc.CompressionConfig(**options))


def test_emulation_finds_mistakes(emulated_library):
    found = emulation.faults_found(emulated_library)
    assert "some wait at a barrier, some have returned" in found[0]
    assert "some wait at a barrier, some have returned" in found[1]
    assert "lanes of its warp that do not come" in found[2]
    assert "left its memory" in found[3]
    assert found[4] == str([-0x5A5A5A5B] * 64)  # rubbish, not zeros
    assert found[5] == str([1024] * 64)


# ---- the functions that call the kernels ----


def test_compress_into_on_the_cpu():
    x = draw("laplace", 3000, torch.float32)
    out = torch.zeros(wc.compress_bound(3000, torch.float32, 1), dtype=torch.uint8)
    size = wc.compress_into(x, out)
    assert size.dtype == torch.int64 and size.shape == () and torch.equal(out[: int(size)], wc.compress(x))
    x[7] = float("nan")
    assert int(wc.compress_into(x, out)) == -1
    with pytest.raises(ValueError, match="at least"):
        wc.compress_into(x, out[:-1])
    with pytest.raises(ValueError, match="uint8"):
        wc.compress_into(x, out.to(torch.int16))


def test_shape_from_the_payload(backend):
    x = draw("laplace", 600, torch.float16).view(20, 30)
    payload = wc.compress(x).to(backend.where)
    decoded = device.decompress(payload, None, False, 1.0, 1 << 20, True)
    assert same_bits(decoded.cpu(), wc.decompress(payload.cpu()))
    with pytest.raises(wc.SizeLimitError):
        device.decompress(payload, None, False, 1.0, 1000, True)
    for end in (0, 5, 16, 30):
        assert device.decompress(payload[:end], None, False, 1.0, 1 << 20, True) is None
    broken = payload.clone()
    broken[30] ^= 1
    assert device.decompress(broken, None, False, 1.0, 1 << 20, False) is None
    assert device.decompress(broken, torch.empty_like(decoded), False, 1.0, 1 << 20, False) is not None


def test_faults_are_named_as_on_the_cpu(backend):
    x = draw("heavy", 600, torch.float32).view(20, 30)
    payload = wc.compress(x).to(backend.where)

    def decode(bytes_there: torch.Tensor, out: torch.Tensor | None = None, **options) -> torch.Tensor:
        arguments = {"accumulate": False, "scale": 1.0, "max_bytes": 1 << 20, "check": True, **options}
        return codec._decompress_on_device(bytes_there, out, **arguments)

    def broken(place: int) -> torch.Tensor:
        other = payload.clone()
        other[place] ^= 1
        return other

    with pytest.raises(wc.BadChecksumError, match="block 0"):
        decode(broken(-1))
    with pytest.raises(wc.BadChecksumError, match="header"):
        decode(broken(52))
    with pytest.raises(wc.BadMagicError):
        decode(broken(0))
    with pytest.raises(wc.TruncatedError):
        decode(payload[:-1])
    with pytest.raises(wc.BadShapeError):
        decode(payload, torch.empty(30, 20, device=backend.where))
    with pytest.raises(TypeError, match=r"expected torch\.float32"):
        decode(payload, torch.empty(20, 30, dtype=torch.float64, device=backend.where))
    with pytest.raises(ValueError, match="where the payload is"):
        decode(payload, torch.empty(20, 30, device="meta"))
    with pytest.raises(ValueError, match="contiguous"):
        decode(payload, torch.empty(30, 20, device=backend.where).T)
    out = torch.ones(20, 30, device=backend.where)
    assert decode(broken(-1), out, accumulate=True, check=False) is out  # nothing waits, nothing is raised
    with pytest.raises(wc.BadChecksumError):
        decode(broken(-1), out.fill_(1), accumulate=True)
    assert bool((out == 1).all())


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    return x.cuda()


@no_gpu
def test_cuda_round_trip_through_the_public_functions():
    x = draw("laplace", 300_000, torch.float32).view(300, 1000)
    payload = wc.compress(on_gpu(x))
    assert payload.is_cuda and torch.equal(payload.cpu(), wc.compress(x))
    assert wc.payload_info(payload) == wc.payload_info(payload.cpu())
    y = wc.decompress(payload)
    assert y.is_cuda and torch.equal(y.cpu(), wc.decompress(payload.cpu()))
    with pytest.raises(ValueError, match="where the payload is"):
        wc.decompress(payload, torch.empty(300, 1000))
    with pytest.raises(ValueError, match="where the payload is"):
        wc.decompress(payload.cpu(), torch.empty(300, 1000, device="cuda"))
    with pytest.raises(wc.BadShapeError):
        wc.decompress(payload, torch.empty(1000, 300, device="cuda"))
    broken = payload.clone()
    broken[-1] ^= 255
    with pytest.raises(wc.BadChecksumError, match="block 4"):
        wc.decompress(broken)
    with pytest.raises(wc.NonFiniteError):
        wc.compress(on_gpu(x / 0))


@no_gpu
def test_cuda_never_waits_where_it_says_so():
    x, out = on_gpu(draw("laplace", 300_000, torch.float32)), torch.zeros(300_000, device="cuda")
    memory = torch.empty(wc.compress_bound(300_000, torch.float32, 1), dtype=torch.uint8, device="cuda")
    payload = wc.compress(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        size = wc.compress_into(x, memory)
        wc.decompress(payload, out, check=False)
        wc.decompress(payload, out, accumulate=True, check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(memory[: int(size)], payload)


@no_gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "laplace", "two", "heavy"])
def test_cuda_large_tensors(kind, dtype):
    x = draw(kind, 3_000_011, dtype)
    payload = wc.compress(on_gpu(x))
    assert torch.equal(payload.cpu(), wc.compress(x))
    assert same_bits(wc.decompress(payload).cpu(), wc.decompress(payload.cpu()))
