"""The codec's CUDA kernels against the CPU's, byte for byte: on a GPU, and everywhere else the same sources on the CPU.

See cuda_emulation/ for how a .cu file runs without a GPU, and what is checked meanwhile.
"""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import torch

import weight_compression as wc
from cuda_emulation import library as emulation
from cuda_emulation.codec import EmulatedCodec
from platonic_core import _C
from test_weight_codec import FLOATS, KINDS, draw
from weight_compression import _device_ops, _ops, codec, device, reference
from weight_compression.payload import Mode, parse_header

SIZES = [1, 2, 15, 16, 17, 1000, 4097]
BLOCK_SIZES = [65535, 65536, 65537, 2 * 65536 + 4099]


class Backend:
    """compress and decompress of CPU tensors by the kernels for devices, wherever they run."""

    def __init__(self, where: str, kernels: EmulatedCodec | None):
        self.where, self.kernels = where, kernels

    def compress(self, x: torch.Tensor, config: wc.CompressionConfig | None = None) -> torch.Tensor | None:
        """The payload, on the CPU; None for values that are not finite."""
        flat, shape = codec._flat_values(x.to(self.where))
        bound = wc.compress_bound(x.numel(), x.dtype, x.ndim)
        payload = device.compress(flat, shape, config or wc.CompressionConfig(), bound)
        return None if payload is None else payload.cpu()

    def decode(
        self, payload: torch.Tensor, out: torch.Tensor, *, accumulate=False, scale=1.0, check=True
    ) -> tuple[torch.Tensor, bool]:
        """What `out` is afterwards, and whether the payload was good."""
        there = out.to(self.where, copy=True)
        status = _device_ops.decompress(payload.to(self.where), there, accumulate, scale, check)
        return there.cpu(), int(status) == 0


no_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _C.has_cuda), reason="needs a CUDA device and a CUDA build"
)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=no_gpu)])
def backend(request, monkeypatch):
    if request.param == "cuda":
        return Backend("cuda", None)
    kernels = EmulatedCodec(request.getfixturevalue("emulated_library"))
    monkeypatch.setattr(_device_ops, "kernels", kernels)
    return Backend("cpu", kernels)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def check_equal(backend: Backend, x: torch.Tensor, config: wc.CompressionConfig | None = None) -> str:
    """Payload and values are the CPU's; returns the mode."""
    expected = wc.compress(x, config)
    payload = backend.compress(x, config)
    assert payload is not None and torch.equal(payload, expected)
    values, good = backend.decode(expected, torch.full_like(x, 1))
    assert good and same_bits(values, wc.decompress(expected))
    return wc.payload_info(payload).mode


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


MODES = {
    "entropy": ("heavy", {}),
    "fixed": ("uniform", {"floor_bits": 9.0}),
    "constant": ("normal", {}),
    "raw": ("normal", {"max_error": 1e-9}),
}


def payload_of(mode: str, n: int, dtype: torch.dtype) -> torch.Tensor:
    kind, options = MODES[mode]
    x = torch.full((n,), 0.75, dtype=dtype) if mode == "constant" else draw(kind, n, dtype)
    payload = wc.compress(x, wc.CompressionConfig(**options))
    assert wc.payload_info(payload).mode == mode
    return payload


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("check", [True, False])
def test_accumulate_is_the_cpus(mode, dtype, check, backend):
    n = 5003
    payload, start = payload_of(mode, n, dtype), draw("normal", n, dtype, seed=1)
    for scale in (1.0, -0.3):
        values, good = backend.decode(payload, start, accumulate=True, scale=scale, check=check)
        expected = wc.decompress(payload, start.clone(), accumulate=True, scale=scale)
        assert good and same_bits(values, expected)


# ---- damaged and hostile payloads ----


@pytest.mark.parametrize("mode", MODES)
def test_every_part_is_covered(mode, backend):
    data, rng, n = payload_of(mode, 3000, torch.float32), np.random.default_rng(0), 3000
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


def reseal(data: np.ndarray, header: int) -> torch.Tensor:
    """With the header's checksum made right again, as an attacker would."""
    data = data.copy()
    data[header - 4 : header] = np.frombuffer(struct.pack("<I", _ops.crc32c(data[: header - 4])), np.uint8)
    return torch.from_numpy(data)


def agree(backend: Backend, payload: torch.Tensor, like: torch.Tensor, check: bool) -> bool:
    """Whether a payload is good: the device and the CPU say the same, and then have the same values."""
    try:
        expected = wc.decompress(payload, torch.empty_like(like), check=check)
    except (wc.PayloadError, TypeError):
        expected = None
    values, good = backend.decode(payload, torch.zeros_like(like), check=check)
    assert good == (expected is not None)
    assert not good or same_bits(values, expected)
    return good


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("mode", ["entropy", "fixed"])
def test_hostile_payloads_are_safe_without_checksums(mode, at_end, backend):
    if backend.kernels is not None:
        backend.kernels.at_end = at_end
    n, rng = 2500, np.random.default_rng(at_end)
    like = torch.empty(n)
    data = payload_of(mode, n, torch.float32).numpy().copy()
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
    assert "thread 40 fails an assertion: threadIdx.x < 40" in found[4]
    assert found[5] == str([-0x5A5A5A5B] * 64)  # rubbish, not zeros
    assert found[6] == str([1024] * 64)


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


@pytest.mark.parametrize(
    "options",
    [{"ratio": 4.0}, {"lossless": True}, {"group_size": 64}, {"per_channel": True}, {"clip_quantile": 0.99}],
)
def test_options_of_the_cpu_are_refused(options, backend):
    with pytest.raises(NotImplementedError, match=f"{next(iter(options))}: .*move the tensor to the CPU"):
        backend.compress(draw("normal", 100, torch.float32), wc.CompressionConfig(**options))


def test_payloads_that_only_the_cpu_decodes(backend):
    x = draw("normal", 3000, torch.float32)
    for options in ({"lossless": True}, {"group_size": 64}, {"clip_quantile": 0.99}):
        payload = wc.compress(x, wc.CompressionConfig(**options)).to(backend.where)
        with pytest.raises(NotImplementedError, match=r"decompress\(payload\.cpu\(\)\)"):
            codec._decompress_on_device(payload, None, False, 1.0, 1 << 20, True)


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
