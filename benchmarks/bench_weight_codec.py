"""compress and decompress of a large float32 tensor, on one thread and on all, against other codecs and a copy.

*Data.* Gaussian, Laplace and uniform values, and two trained layers: the 784 x 392 weights of a tanh perceptron and the
64 x 128 x 3 x 3 kernels of a small convolutional network, trained for a minute on MNIST (``--data-dir``) or
scikit-learn's digits. They are too small to time, so the tensor holds *values drawn from them at random*, with
replacement: their histogram, which is all that the codec uses, without their order. (Repeated in order, zstandard would
find the copies. A layer of 64M weights that trains within minutes keeps its initial values: after 40 steps their kurtosis
was 3.000, which is the Gaussian's row.)

*Peers* code bins of the same width, as far as a byte goes, so that the largest error is the same: rounding to multiples
of (hi - lo) / K needs K + 1 codes (the first and last of half the width). zstandard and blosc2 (zstd) at level 1, and
constriction's range coder with the symbols' frequencies, on its first values only, since it is slow, and on one thread.
blosc2 has no filter: with bytes there is nothing to shuffle, and bit planes cost time and ratio. Their quantiser is torch's
``quantize_per_tensor`` or plain tensor operations in place, whichever is faster here; so is the way back.

Verified first: every value within the error bound, each peer's symbols equal. "all in": from the tensor to the finished
payload, in the memory that the last one left behind as in a training loop ("encode new": in new memory; the peers' quantisers
have scratch of their own all along), and back into a given tensor. The copy's bandwidth counts bytes read and written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import machine, print_rows, time_interleaved
from trained_networks import (
    BATCH,
    Images,
    Recipe,
    largest_weight,
    load_images,
    prepare,
    train_convolutional,
    train_perceptron,
)

import weight_compression as wc
from platonic_core.memory import release_recycled

ENCODE_BAR, DECODE_BAR = 0.8, 1.5  # G weights/s on one core
SLOW_NUMEL = 1 << 21  # values that constriction gets
MLP_STEPS, CNN_STEPS = 6000, 600  # of 100 images: MNIST ten times and once


def run(quick: bool = False, data_dir: Path | None = None) -> list[dict]:
    threads = torch.get_num_threads()
    numel = (1 << 22) if quick else (1 << 26)
    source, images = load_images(data_dir)
    rows = []
    try:
        for data in ("gaussian", "mlp") if quick else ("gaussian", "laplace", "uniform", "mlp", "cnn"):
            torch.set_num_threads(threads)
            x = _trained(data, images, quick, numel) if data in ("mlp", "cnn") else _draw(data, numel)
            name = f"{data}, {source}, drawn" if data in ("mlp", "cnn") else data
            for count in sorted({1, threads}):
                torch.set_num_threads(count)
                rows += [{"data": name, "threads": count, **row} for row in _measure(x, count, quick)]
    finally:
        torch.set_num_threads(threads)
    return rows


def _draw(data: str, numel: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if data == "gaussian":
        return torch.randn(numel, generator=generator) * 0.02
    uniform = torch.rand(numel, generator=generator)
    if data == "uniform":
        return uniform - 0.5
    sign = torch.randint(0, 2, (numel,), generator=generator) * 2.0 - 1
    return -0.01 * torch.log(uniform.clamp_min(1e-12)) * sign


def _trained(data: str, images: Images, quick: bool, numel: int) -> torch.Tensor:
    """Values drawn from the largest layer's weights of a trained network."""
    if data == "cnn":
        network = train_convolutional(images, CNN_STEPS // 10 if quick else CNN_STEPS, seed=0)
    else:
        recipe = Recipe()
        epochs = max(1, MLP_STEPS * BATCH // len(images.x) // (10 if quick else 1))
        *_, (network, _) = train_perceptron(prepare(images, recipe), recipe, epochs, seed=0)
    weight = largest_weight(network).flatten()
    return weight[torch.randint(weight.numel(), (numel,), generator=torch.Generator().manual_seed(0))]


class ByteQuantiser:
    """float32 x [n] to bytes of lo to hi, `bins` steps apart, and back, by the fastest of torch's ways.

    ``quantize_per_tensor`` is deprecated since torch 2.13, and left out once it is gone.
    """

    def __init__(self, x: torch.Tensor, bins: int, lo: float, hi: float):
        self.x, self.levels = x, min(bins, 255) + 1
        self.step = (hi - lo) / (self.levels - 1)
        self.zero = round(-lo / self.step)
        self.scratch, self.symbols = torch.empty_like(x), torch.empty(x.numel(), dtype=torch.uint8)
        warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
        ways = {"plain": (self._plain, self._plain_back)}
        if hasattr(torch, "quantize_per_tensor") and 0 <= self.zero < self.levels:
            ways["quantize_per_tensor"] = (self._builtin, self._builtin_back)
        backs = time_interleaved({name: way[1] for name, way in ways.items()}, rounds=3)
        forths = time_interleaved({name: way[0] for name, way in ways.items()}, rounds=3)
        self.way, self.way_back = (min(times, key=lambda name: times[name][1]) for times in (forths, backs))
        self.quantise, self.restore = ways[self.way][0], ways[self.way_back][1]
        self.quantise()
        if not float((self.restore() - x).abs().max()) <= 1.01 * self.step:
            raise AssertionError("the peer's values are not its own")

    def _plain(self) -> torch.Tensor:
        torch.sub(self.x, self.zero_value, out=self.scratch).mul_(1 / self.step).round_().clamp_(0, self.levels - 1)
        return self.symbols.copy_(self.scratch)

    def _plain_back(self) -> torch.Tensor:
        return torch.mul(self.symbols, self.step, out=self.scratch).add_(self.zero_value)

    def _builtin(self) -> torch.Tensor:
        codes = torch.quantize_per_tensor(self.x, self.step, self.zero, torch.quint8)
        self.symbols = codes.int_repr()
        return self.symbols

    def _builtin_back(self) -> torch.Tensor:
        return torch._make_per_tensor_quantized_tensor(self.symbols, self.step, self.zero).dequantize()

    @property
    def zero_value(self) -> float:
        return -self.zero * self.step


Codec = tuple[Callable[[], object], Callable[[], object], Callable[[], int]]  # encode, decode, bytes


def _zstandard(quantiser: ByteQuantiser, threads: int) -> Codec:
    import zstandard

    compressor = zstandard.ZstdCompressor(level=1, threads=0 if threads == 1 else threads)
    decompressor = zstandard.ZstdDecompressor()
    coded = compressor.compress(quantiser.quantise().numpy())

    def decode() -> torch.Tensor:
        with decompressor.stream_reader(coded) as reader:
            reader.readinto(quantiser.symbols.numpy())
        return quantiser.restore()

    return lambda: compressor.compress(quantiser.quantise().numpy()), decode, lambda: len(coded)


def _blosc2(quantiser: ByteQuantiser, threads: int) -> Codec:
    import blosc2

    settings = {
        "codec": blosc2.Codec.ZSTD, "clevel": 1, "typesize": 1, "nthreads": threads,
        "filters": [blosc2.Filter.NOFILTER], "filters_meta": [0],
    }  # fmt: skip
    coded = blosc2.compress2(quantiser.quantise().numpy(), **settings)

    def decode() -> torch.Tensor:
        blosc2.decompress2(coded, dst=quantiser.symbols.numpy(), nthreads=threads)
        return quantiser.restore()

    return lambda: blosc2.compress2(quantiser.quantise().numpy(), **settings), decode, lambda: len(coded)


def _constriction(quantiser: ByteQuantiser, threads: int) -> Codec:
    from constriction import stream

    def encode() -> tuple[np.ndarray, object]:
        symbols = quantiser.quantise().numpy()
        counts = np.bincount(symbols, minlength=quantiser.levels).astype(np.float64)
        distribution = stream.model.Categorical(counts / len(symbols), perfect=False)
        encoder = stream.queue.RangeEncoder()
        encoder.encode(symbols.astype(np.int32), distribution)
        return encoder.get_compressed(), distribution

    coded, distribution = encode()

    def decode() -> torch.Tensor:
        symbols = stream.queue.RangeDecoder(coded).decode(distribution, quantiser.x.numel())
        quantiser.symbols.copy_(torch.from_numpy(symbols))
        return quantiser.restore()

    return encode, decode, lambda: coded.nbytes


PEERS = {"zstandard 1": _zstandard, "blosc2 zstd 1": _blosc2, "constriction range": _constriction}


def _measure(x: torch.Tensor, threads: int, quick: bool) -> list[dict]:
    """A row for the codec of this library and one for each peer."""
    payload = wc.compress(x)
    info = wc.payload_info(payload)
    out, target = torch.empty_like(x), torch.empty_like(x)
    wc.decompress(payload, out)
    if not float((out - x).abs().max()) <= info.error_bound + 2.0**-20 * float(x.abs().max()):
        raise AssertionError("a value is beyond the error bound")
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: wc.compress(x),
        "encode new": lambda: _compress_anew(x),
        "decode": lambda: wc.decompress(payload, out),
        "decode new": lambda: wc.decompress(payload),
        "accumulate": lambda: wc.decompress(payload, out, accumulate=True, scale=0.5),
        "copy": lambda: target.copy_(x),
    }
    numel = dict.fromkeys(calls, x.numel())
    peers: list[tuple[str, str | None, float]] = []  # name, what is missing, bits
    lo, hi = float(x.min()), float(x.max())
    whole = ByteQuantiser(x, info.levels, lo, hi)
    for name, make in PEERS.items():
        if make is _constriction and threads > 1:
            continue
        quantiser = ByteQuantiser(x[:SLOW_NUMEL], info.levels, lo, hi) if make is _constriction else whole
        try:
            encode, decode, size = make(quantiser, threads)
        except ImportError as error:
            peers.append((name, f"{error.name} is not installed", 0.0))
            continue
        symbols = quantiser.quantise().clone()
        quantiser.symbols = torch.zeros_like(symbols)
        decode()
        if not torch.equal(quantiser.symbols, symbols):
            raise AssertionError(f"{name} does not give back its symbols")
        calls |= {f"{name} encode": encode, f"{name} decode": decode}
        numel |= dict.fromkeys((f"{name} encode", f"{name} decode"), quantiser.x.numel())
        peers.append((name, None, 8 * size() / quantiser.x.numel()))
    times = time_interleaved(calls, rounds=3 if quick else 7)
    giga = {name: numel[name] / middle / 1e9 for name, (_, middle, _) in times.items()}
    counts = torch.histc(x, info.levels).double()
    p = counts[counts > 0] / counts.sum()
    ours: dict = {
        "codec": "weight_compression",
        "levels": info.levels,
        "bits": info.bits_per_weight,
        "over entropy %": 100 * (info.bits_per_weight / float(-(p * p.log2()).sum()) - 1),
        "encode G/s": giga["encode"],
        "decode G/s": giga["decode"],
    }
    if threads == 1:
        ours["bars met"] = f"{_met(giga['encode'], ENCODE_BAR)}, {_met(giga['decode'], DECODE_BAR)}"
    ours |= {
        "encode new G/s": giga["encode new"],
        "decode new G/s": giga["decode new"],
        "accumulate G/s": giga["accumulate"],
        "copy GB/s": 8 * giga["copy"],
    }
    return [ours] + [_peer_row(name, missing, bits, giga, whole) for name, missing, bits in peers]


def _compress_anew(x: torch.Tensor) -> torch.Tensor:
    release_recycled()
    return wc.compress(x)


def _met(value: float, bar: float) -> str:
    return "yes" if value >= bar else "no"


def _peer_row(name: str, missing: str | None, bits: float, giga: dict[str, float], quantiser: ByteQuantiser) -> dict:
    if missing is not None:
        return {"codec": name, "quantiser": f"skipped: {missing}"}
    encode, decode = giga[f"{name} encode"], giga[f"{name} decode"]
    return {
        "codec": name,
        "levels": quantiser.levels,
        "bits": bits,
        "encode G/s": encode,
        "decode G/s": decode,
        "x encode": giga["encode"] / encode,
        "x decode": giga["decode"] / decode,
        "quantiser": f"{quantiser.way}, back {quantiser.way_back}",
    }


if __name__ == "__main__":
    print(machine())
    print_rows(run())
