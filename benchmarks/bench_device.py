"""The native kernels on a GPU against what torch offers (cuBLAS, cuSOLVER), with a measured ceiling beside them.

``python -m benchmarks --only device --device cuda``. Every kernel is verified against its peer first. A ceiling is the
slower of the kernel's bytes at the bandwidth of a copy and its operations at the rate of a matrix product of the same
dtype, both measured in the same run, turn by turn with the kernel. On the CPU the other benchmarks say more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import Skipped, copy_call, fma_call, print_rows, time_interleaved

import weight_compression as wc
from platonic import _ops, narrow
from platonic.batched import rolling_ridge
from platonic.pca import sorted_pca


def _report(
    kernel: str, size: str, dtype: torch.dtype, device: str, ours: Callable, peer: Callable, moved: float, work: float
) -> dict:
    copied, copy_bytes = copy_call(256 << 20 if device == "cuda" else 16 << 20, device)
    product, product_work = fma_call(dtype, device, 4096 if device == "cuda" else 512)
    calls = {"ours": ours, "peer": peer, "copy": copied, "product": product}
    times = time_interleaved(calls, rounds=11 if device == "cuda" else 3)
    bandwidth, rate = copy_bytes / times["copy"][1], product_work / times["product"][1]
    low, middle, high = times["ours"]
    return {
        "kernel": kernel, "size": size, "dtype": str(dtype)[6:], "ms": 1e3 * middle, "20%": 1e3 * low, "80%": 1e3 * high,
        "torch ms": 1e3 * times["peer"][1], "x torch": times["peer"][1] / middle, "GB/s": moved / middle / 1e9,
        "copy GB/s": bandwidth / 1e9, "GFLOP/s": work / middle / 1e9, "mm GFLOP/s": rate / 1e9,
        "x floor": middle / max(moved / bandwidth, work / rate),
    }  # fmt: skip


def _close(ours: torch.Tensor, peer: torch.Tensor, tolerance: float, what: str) -> None:
    error = float((ours.double() - peer.double()).norm() / peer.double().norm())
    if not error <= tolerance:
        raise AssertionError(f"{what}: relative difference {error}, expected at most {tolerance}")


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).to(device)


def gram(device: str, quick: bool) -> list[dict]:
    """Centred moments of [x | y], y of 10 columns; the peer centres and multiplies."""
    rows, m = [], 8_192 if quick else 262_144
    for dtype in (torch.float32, torch.float64):
        for p in (16, 64) if quick else (16, 64, 128, 512):
            x, y = _normal((m, p), dtype, device), _normal((m, 10), dtype, device)

            def ours(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                return _ops.gram(x, y).gram

            def peer(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                v = torch.cat([x, y], 1)
                v = v - v.mean(0)
                return v.T @ v

            _close(ours(), peer(), 1e-4 if dtype == torch.float32 else 1e-12, "gram")
            width = p + 10
            work = m * width * (width + 1.0)
            rows.append(
                _report("gram", f"{m} x {p}", dtype, device, ours, peer, m * width * x.element_size() * 1.0, work)
            )
    return rows


def batched(device: str, quick: bool) -> list[dict]:
    """Systems from Gram matrices; the peer is a batched Cholesky factorisation and solve."""
    rows, batch = [], 1_000 if quick else 20_000
    for dtype in (torch.float32, torch.float64):
        for p in (8, 32) if quick else (8, 16, 32, 64, 128):
            x = _normal((batch if p <= 32 else batch // 10, 2 * p, p), dtype, device)
            count, matrix = len(x), x.mT @ x
            right = _normal((count, p, 1), dtype, device)
            shifted = matrix + 0.5 * torch.eye(p, dtype=dtype, device=device)
            l2 = torch.tensor([0.5], dtype=torch.float64)

            def ours(matrix: torch.Tensor = matrix, right: torch.Tensor = right, l2: torch.Tensor = l2) -> torch.Tensor:
                rtol = 10 * torch.finfo(matrix.dtype).eps
                return torch.ops.platonic.batched_ridge_gram(matrix, right, l2, rtol)[0][:, 0]

            def peer(right: torch.Tensor = right, shifted: torch.Tensor = shifted) -> torch.Tensor:
                return torch.cholesky_solve(right, torch.linalg.cholesky(shifted))

            exact = torch.linalg.solve(shifted.double(), right.double())
            _close(ours(), exact, 1e3 * torch.finfo(dtype).eps, "batched_ridge")
            moved = count * (matrix.element_size() * (p * p + 2.0 * p) + 4)
            work = count * (p**3 / 3 + 2.0 * p * p)
            rows.append(_report("batched_ridge", f"{count} x {p}", dtype, device, ours, peer, moved, work))
    return rows


def rolling(device: str, quick: bool) -> list[dict]:
    """The peer solves all windows as one batch of Gram matrices."""
    n, p, window, l2 = (500, 5, 60, 0.1) if quick else (10_000, 20, 252, 0.1)
    x, y = _normal((n, p), torch.float64, device), _normal((n,), torch.float64, device)

    def ours() -> torch.Tensor:
        return rolling_ridge(x, y, window, l2, fit_intercept=False).coef

    def peer() -> torch.Tensor:
        outer = torch.nn.functional.pad(
            (x[:, :, None] * torch.cat([x, y[:, None]], 1)[:, None]).cumsum(0), [0] * 4 + [1, 0]
        )
        sums = outer[window:] - outer[:-window]
        shifted = sums[:, :, :p] + l2 * torch.eye(p, dtype=x.dtype, device=device)
        return torch.cholesky_solve(sums[:, :, p:], torch.linalg.cholesky(shifted))[..., 0]

    _close(ours()[window - 1 :], peer(), 1e-8, "rolling_ridge")
    work = n * (p**3 / 3 + 4.0 * p * p)
    moved = 8.0 * n * (2 * p + 1)
    return [_report("rolling_ridge", f"{n} x {p}, window {window}", torch.float64, device, ours, peer, moved, work)]


def first_component(device: str, quick: bool) -> list[dict]:
    """The peer takes the principal component from the eigenvectors of the covariance."""
    m, n, count = (2_000, 64, 50) if quick else (60_000, 784, 1_000)
    x = _normal((m, n), torch.float32, device) * 0.9 ** torch.arange(n, device=device)

    def ours() -> Any:
        return sorted_pca(x, count)

    def peer() -> Any:
        centred = x - x.mean(0)
        axis = torch.linalg.eigh(centred.T @ centred)[1][:, -1]
        order = torch.argsort(centred @ (axis * torch.sign(axis[axis.abs().argmax()])))
        return order[(2 * torch.arange(count, device=device) + 1) * m // (2 * count)]

    differ = float((torch.as_tensor(ours(), device=device) != peer()).double().mean())
    if differ > 0.05:
        raise AssertionError(f"sorted_pca: {differ:.0%} of the samples differ from the peer's")
    return [_report("sorted_pca", f"{m} x {n}", torch.float32, device, ours, peer, 4.0 * m * n, 4.0 * m * n)]


def deep(device: str, quick: bool) -> list[dict]:
    """200 layers of 12 celu units; the peer is the same walk, written with torch operations, in float64."""
    m, width, layers = 5_000, 12, 20 if quick else 200
    x = torch.linspace(-1, 1, m, dtype=torch.float64, device=device)[:, None]
    y = torch.sin(2 * torch.pi * x)

    def ours() -> Any:
        return narrow.fit_narrow(x, y, [width] * layers, alpha=0.3, l2=1e-3, scaling="absolute", random_state=0).lsd

    def peer() -> torch.Tensor:
        rng, z = np.random.default_rng(0), x
        for _ in range(layers):
            draw = torch.from_numpy(rng.standard_normal((2 + z.shape[1], width))).to(device)
            mean, y_mean = z.mean(0), y.mean(0)
            centred = z - mean
            shifted = centred.T @ centred + 1e-3 * torch.eye(z.shape[1], dtype=z.dtype, device=device)
            B = torch.linalg.solve(shifted, centred.T @ (y - y_mean))
            bias = 0.3 * (draw[0] + (y_mean - mean @ B) @ draw[-1:])
            z = torch.celu(torch.addmm(bias, z, 0.3 * (draw[1:-1] + B @ draw[-1:])))
        return z

    work = 2.0 * layers * m * (width**2 + width * (width + 1) / 2 + 2 * width)
    moved = 2.0 * layers * m * width * 8
    if not np.isfinite(np.asarray(torch.as_tensor(ours()).cpu())).all():
        raise AssertionError("fit_narrow: an LSD is not finite")
    size = f"{layers} layers x {width}, {m} rows"
    return [_report("fit_narrow", size, torch.float64, device, ours, peer, moved, work)]


def codec(device: str, quick: bool) -> list[dict]:
    """1 GiB compressed and decompressed; the peer is a copy of the tensor. GB/s are of the tensor's bytes alone."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        n = (1 << 22 if quick else 1 << 30) // dtype.itemsize
        x = torch.randn(n, generator=torch.Generator(device).manual_seed(0), device=device).mul_(0.02).to(dtype)
        memory = torch.empty(wc.compress_bound(n, dtype, 1), dtype=torch.uint8, device=device)
        payload, out, other = wc.compress(x), torch.empty_like(x), torch.empty_like(x)
        size = wc.compress_into(x, memory)
        if not torch.equal(memory[: int(size)], payload):
            raise AssertionError("compress_into and compress differ")
        wc.decompress(payload, out)
        bound = wc.payload_info(payload).error_bound + 2 * float(x.abs().max()) * torch.finfo(dtype).eps
        if not float((out.float() - x.float()).abs().max()) <= bound:
            raise AssertionError("a value is beyond the error bound")

        def peer(x: torch.Tensor = x, other: torch.Tensor = other) -> Any:
            return other.copy_(x)

        def encode(x: torch.Tensor = x, memory: torch.Tensor = memory) -> Any:
            return wc.compress_into(x, memory)

        def decode(payload: torch.Tensor = payload, out: torch.Tensor = out) -> Any:
            return wc.decompress(payload, out, check=False)

        def checked(payload: torch.Tensor = payload, out: torch.Tensor = out) -> Any:
            return wc.decompress(payload, out)

        def accumulate(payload: torch.Tensor = payload, out: torch.Tensor = out) -> Any:
            return wc.decompress(payload, out, accumulate=True, scale=0.5, check=False)

        calls = {"encode": encode, "decode": decode, "decode, checked": checked, "accumulate": accumulate}
        for name, call in calls.items():
            size = f"{n} values to {8 * payload.numel() / n:.2f} bits"
            moved = 1.0 * n * dtype.itemsize
            rows.append(_report(f"codec: {name}", size, dtype, device, call, peer, moved, 0.0))
    return rows


KERNELS = (gram, batched, rolling, first_component, deep, codec)


def run(quick: bool = False, device: str = "cpu") -> list[dict]:
    """Rows of all kernels; `quick`: small sizes."""
    if device == "cpu":
        raise Skipped("compares the kernels on a GPU; use --device cuda")
    if not torch.cuda.is_available():
        raise Skipped("torch sees no GPU")
    return measure(device, quick)


def measure(device: str, quick: bool) -> list[dict]:
    rows = []
    for kernel in KERNELS:
        rows += kernel(device, quick)
        print_rows(rows[-1:])
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    print_rows(run(arguments.quick, arguments.device))
