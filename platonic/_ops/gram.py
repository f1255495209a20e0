"""Ops of the second-moment kernel."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch

from platonic._ops._entry import check, check_rows, kernels, pointer, where


class Moments(NamedTuple):
    """What :func:`gram` returns; two of them are combined by :func:`merge_moments`.

    Attributes
    ----------
    gram : torch.Tensor
        float64 [p, p], sum_i w_i (v_i - mean) (v_i - mean)^T; not divided by the total.
    mean : torch.Tensor
        float64 [p], weighted mean.
    total : torch.Tensor
        float64 [], sum of the weights.
    """

    gram: torch.Tensor
    mean: torch.Tensor
    total: torch.Tensor


@torch.library.custom_op("platonic::gram", mutates_args=())
def _gram(
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    sample_weight: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    x_mean: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    return_z: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = check_rows(x, "gram")
    m, n = x.shape
    if activation not in kernels.activations:
        raise ValueError(f"gram: expected an activation of {sorted(kernels.activations)}, got {activation!r}")
    if weight is None and (bias is not None or activation != "identity"):
        raise ValueError("gram: bias and activation belong to a fused layer, so they need weight")
    if (x_mean is None) != (x_scale is None):
        raise ValueError("gram: expected both x_mean and x_scale or neither")
    width = n if weight is None else weight.shape[-1]
    targets = 0 if y is None else y.shape[-1]
    weight = check(weight, "weight", (n, width), x, "gram")
    bias = check(bias, "bias", (width,), x, "gram")
    x_mean = check(x_mean, "x_mean", (n,), x, "gram")
    x_factor = None if x_scale is None else check(x_scale, "x_scale", (n,), x, "gram").reciprocal()
    y = check(y, "y", (m, targets), x, "gram")
    sample_weight = check(sample_weight, "sample_weight", (m,), x, "gram")
    p = width + targets
    if p == 0:
        raise ValueError("gram: expected at least one column of [z | y], got none")
    gram = torch.empty(p, p, dtype=torch.float64, device=x.device)
    mean = torch.empty(p, dtype=torch.float64, device=x.device)
    total = torch.empty((), dtype=torch.float64, device=x.device)
    z = torch.empty((m, width) if return_z else (0, width), dtype=x.dtype, device=x.device)
    scratch = None
    if x.device.type == "cuda":
        scratch = torch.empty(kernels.gram_scratch_bytes(m, p), dtype=torch.uint8, device=x.device)
    kernels.gram(
        x.dtype == torch.float64, m, n, x.stride(0), x.data_ptr(), pointer(x_mean), pointer(x_factor),
        pointer(weight), pointer(bias), kernels.activations[activation], width, pointer(y), targets,
        pointer(sample_weight), z.data_ptr() if return_z else 0, gram.data_ptr(), mean.data_ptr(), total.data_ptr(),
        pointer(scratch), *where(x),
    )  # fmt: skip
    return gram, mean, total, z


@_gram.register_fake
def _(x, y=None, sample_weight=None, weight=None, bias=None, activation="identity", x_mean=None, x_scale=None,
      return_z=False):  # fmt: skip
    width = x.shape[1] if weight is None else weight.shape[1]
    p = width + (0 if y is None else y.shape[1])
    z = x.new_empty((x.shape[0] if return_z else 0, width))
    return (
        x.new_empty((p, p), dtype=torch.float64),
        x.new_empty((p,), dtype=torch.float64),
        x.new_empty((), dtype=torch.float64),
        z,
    )


@overload
def gram(
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    *,
    sample_weight: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    x_mean: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    z_out: Literal[False] = False,
) -> Moments: ...
@overload
def gram(
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    *,
    sample_weight: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    x_mean: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    z_out: Literal[True],
) -> tuple[Moments, torch.Tensor]: ...
def gram(
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    *,
    sample_weight: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    x_mean: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    z_out: bool = False,
) -> Moments | tuple[Moments, torch.Tensor]:
    """Weighted mean and centred second moments of [z | y] in one pass over the rows of x.

    z is x, or (x - x_mean) / x_scale, or with `weight` the layer act(z W + b) of that, computed block by block in
    cache. Accuracy and determinism are stated in ``csrc/platonic/gram.h``.

    Parameters
    ----------
    x : torch.Tensor
        [m, n], float32 or float64. All other tensors have its dtype and device. Rows may be strided.
    y : torch.Tensor, optional
        [m, k], further columns.
    sample_weight : torch.Tensor, optional
        [m], not negative; 1 by default.
    weight, bias, activation : torch.Tensor [n, h], torch.Tensor [h], str, optional
        The layer; activation is 'identity', 'relu', 'abs', 'tanh' or 'celu'.
    x_mean, x_scale : torch.Tensor, optional
        [n] each: columns of x are standardised first.
    z_out : bool, default False
        Return z [m, h] too.

    Returns
    -------
    Moments, or (Moments, torch.Tensor) with `z_out`
    """
    *moments, z = _gram(x, y, sample_weight, weight, bias, activation, x_mean, x_scale, z_out)
    return (Moments(*moments), z) if z_out else Moments(*moments)


def use_gram_kernel(rows: int, width: int, dtype: torch.dtype, inputs: int = 0) -> bool:
    """Whether :func:`gram` beats multiplying in chunks by way of BLAS, by shape and dtype alone.

    `width` counts the columns of [z | y], `inputs` those of x where a layer is fused, else 0. Measured by
    benchmarks/bench_gram.py on a 2-core Cascade Lake: ahead at every number of rows, in both dtypes, up to 512
    columns and, with a layer, up to 256 inputs; beyond, BLAS's blocking for larger caches wins.
    """
    return rows > 0 and dtype in (torch.float32, torch.float64) and 0 < width <= 512 and inputs <= 256


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of `a` and `b` together (Chan, Golub and LeVeque 1983): exact up to float64 rounding."""
    total = a.total + b.total
    share = torch.where(total > 0, b.total / total, torch.zeros_like(total))
    delta = b.mean - a.mean
    return Moments(a.gram + (b.gram + torch.outer(delta, delta) * (a.total * share)), a.mean + delta * share, total)
