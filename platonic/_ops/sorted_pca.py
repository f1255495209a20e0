"""Ops of the first principal component: products with the rows, projections of the rows."""

from __future__ import annotations

import torch

from platonic._ops._entry import check, check_rows, kernels, pointer, where


def _check_joined(x: torch.Tensor, y: torch.Tensor | None, op: str) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """x, y of one dtype and device with as many rows, and the width of [x | y]."""
    x = check_rows(x, op)
    targets = 0 if y is None else y.shape[-1]
    return x, check(y, "y", (x.shape[0], targets), x, op), x.shape[1] + targets


@torch.library.custom_op("platonic::centred_product", mutates_args=())
def centred_product(
    x: torch.Tensor,
    shift: torch.Tensor,
    vectors: torch.Tensor,
    y: torch.Tensor | None = None,
    sample_weight: torch.Tensor | None = None,
    sums: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dots = (v_i - shift) . vectors[b] [m, b] in x's dtype, sum_i w_i dots_i (v_i - shift) [b, p] and, with `sums`,
    sum_i w_i (v_i - shift) [p] (else an empty tensor), both float64.

    v = [x | y] [m, p]; shift [p], vectors [b, p] with 1 <= b <= 4, y [m, k] and sample_weight [m] have x's dtype.
    """
    x, y, p = _check_joined(x, y, "centred_product")
    count = vectors.shape[0]
    if not 1 <= count <= kernels.max_product_vectors:
        raise ValueError(f"centred_product: expected 1 to {kernels.max_product_vectors} vectors, got {count}")
    shift = check(shift, "shift", (p,), x, "centred_product")
    vectors = check(vectors, "vectors", (count, p), x, "centred_product")
    sample_weight = check(sample_weight, "sample_weight", (x.shape[0],), x, "centred_product")
    dots = torch.empty(x.shape[0], count, dtype=x.dtype, device=x.device)
    product = torch.empty(count, p, dtype=torch.float64, device=x.device)
    total = torch.empty(p if sums else 0, dtype=torch.float64, device=x.device)
    scratch = None
    if x.device.type == "cuda":
        scratch = torch.empty(kernels.product_slices(x.shape[0]), count + 1, p, dtype=torch.float64, device=x.device)
    kernels.centred_product(
        x.dtype == torch.float64, x.shape[0], x.shape[1], x.stride(0), x.data_ptr(), pointer(y), p - x.shape[1],
        pointer(sample_weight), shift.data_ptr(), vectors.data_ptr(), count, dots.data_ptr(), product.data_ptr(),
        total.data_ptr() if sums else 0, pointer(scratch), *where(x),
    )  # fmt: skip
    return dots, product, total


@centred_product.register_fake
def _(x, shift, vectors, y=None, sample_weight=None, sums=True):
    dots = x.new_empty((x.shape[0], vectors.shape[0]))
    product = vectors.new_empty(vectors.shape, dtype=torch.float64)
    return dots, product, shift.new_empty(shift.shape if sums else (0,), dtype=torch.float64)


@torch.library.custom_op("platonic::project_rows", mutates_args=())
def project_rows(
    x: torch.Tensor, shift: torch.Tensor, direction: torch.Tensor, y: torch.Tensor | None = None
) -> torch.Tensor:
    """(v_i - shift) . direction [m] in float64, v = [x | y] [m, p]; shift and direction are float64 [p].

    Each row's result depends on that row alone, bit by bit: equal rows tie.
    """
    x, y, p = _check_joined(x, y, "project_rows")
    for name, vector in (("shift", shift), ("direction", direction)):
        if vector.dtype != torch.float64 or vector.shape != (p,) or vector.device != x.device:
            raise ValueError(
                f"project_rows: expected {name} of float64 and shape ({p},) on {x.device}, got {vector.dtype}, "
                f"{tuple(vector.shape)}, {vector.device}"
            )
    shift, direction = shift.contiguous(), direction.contiguous()
    out = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    kernels.project_rows(
        x.dtype == torch.float64, x.shape[0], x.shape[1], x.stride(0), x.data_ptr(), pointer(y), p - x.shape[1],
        shift.data_ptr(), direction.data_ptr(), out.data_ptr(), *where(x),
    )  # fmt: skip
    return out


@project_rows.register_fake
def _(x, shift, direction, y=None):
    return x.new_empty((x.shape[0],), dtype=torch.float64)
