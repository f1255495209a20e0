"""batched_ridge from Gram matrices, against torch.linalg.cholesky + cholesky_solve and against the machine's floor.

One thread. The floor is the larger of the bytes of G, C, W and status over the bandwidth of a copy (of arrays beyond
every cache, and of as many bytes as the problem has: both are printed), and of p^3/3 + 2 p^2 operations a system over
the rate of a matrix product; all measured in the same run, turn by turn.
"""

from __future__ import annotations

import torch
from common import copy_call, fma_call, machine, print_rows, time_interleaved

from platonic.batched import batched_ridge


def run(quick: bool = False) -> list[dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dtypes = (torch.float32,) if quick else (torch.float32, torch.float64)
        sizes = (8, 16, 32) if quick else (4, 8, 13, 16, 32, 64, 128)
        return [_measure(p, dtype, quick) for dtype in dtypes for p in sizes]
    finally:
        torch.set_num_threads(threads)


def _measure(p: int, dtype: torch.dtype, quick: bool) -> dict:
    batch = 10_000 if p <= 32 else 1_000
    generator = torch.Generator().manual_seed(p)
    x = torch.randn(batch, 2 * p, p, dtype=dtype, generator=generator)
    gram, right = x.mT @ x, torch.randn(batch, p, 1, dtype=dtype, generator=generator)
    shifted = gram + 0.5 * torch.eye(p, dtype=dtype)
    l2, rtol = torch.tensor([0.5], dtype=torch.float64), 10 * torch.finfo(dtype).eps

    def ours() -> torch.Tensor:
        return torch.ops.platonic.batched_ridge_gram(gram, right, l2, rtol)[0][:, 0]

    def peer() -> torch.Tensor:
        return torch.cholesky_solve(right, torch.linalg.cholesky(shifted))

    exact = torch.linalg.solve(shifted.double(), right.double())
    error = ((ours() - exact).norm() / exact.norm()).item()
    if not error < 1e3 * torch.finfo(dtype).eps:
        raise AssertionError(f"p = {p}: relative error {error}")
    if batched_ridge(gram, right, 0.5, gram=True).status.any():
        raise AssertionError(f"p = {p}: a system was refused")

    moved = batch * (gram.element_size() * (p * p + 2 * p) + 4)
    near, near_moved = copy_call(moved // 2)
    far, far_moved = copy_call(256 << 20)
    product, work = fma_call(dtype)
    calls = {"ours": ours, "peer": peer, "near": near, "far": far, "product": product}
    times = time_interleaved(calls, rounds=5 if quick else 11)
    by_bytes = moved * times["far"][1] / far_moved
    by_near_bytes = moved * times["near"][1] / near_moved
    by_work = batch * (p**3 / 3 + 2 * p * p) * times["product"][1] / work
    low, middle, high = times["ours"]
    return {
        "p": p,
        "dtype": str(dtype)[6:],
        "systems": batch,
        "ns/system": 1e9 * middle / batch,
        "20%": 1e9 * low / batch,
        "80%": 1e9 * high / batch,
        "torch": 1e9 * times["peer"][1] / batch,
        "x torch": times["peer"][1] / middle,
        "floor: bytes": 1e9 * by_bytes / batch,
        "bytes in cache": 1e9 * by_near_bytes / batch,
        "work": 1e9 * by_work / batch,
        "x floor": middle / max(by_bytes, by_work),
        "x floor in cache": middle / max(by_near_bytes, by_work),
        "error": error,
    }


if __name__ == "__main__":
    print(machine())
    print_rows(run())
