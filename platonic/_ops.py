"""Step 5 of *fit*: the only file of this room that takes ``data_ptr()``.

Each op checks dtype, shape, device and layout once, allocates outputs and scratch, passes the current stream, and
is registered with ``torch.library`` (schema and fake; autograd where a gradient makes sense) as ``platonic::<name>``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from platonic_core import _C

_kernels = _C.platonic


def _stream(device: torch.device) -> int:
    """The ``cudaStream_t`` that torch is using on `device`, 0 on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _where(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(device index or -1 for the CPU, CPU threads, stream): how every kernel is told where to run."""
    if tensor.device.type == "cuda":
        return tensor.device.index, 0, _stream(tensor.device)
    if tensor.device.type == "cpu":
        return -1, torch.get_num_threads(), 0
    raise ValueError(f"expected a tensor on cpu or cuda, got one on {tensor.device}")


# ---- fit_narrow ----

ACTIVATIONS: dict[str, int] = dict(_kernels.activations)
NARROW_PANEL: int = _kernels.narrow_panel
NARROW_MAX_WIDTH: int = _kernels.narrow_max_width


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor, dtype=torch.float64) -> None:
    """Raise ValueError unless `tensor` is contiguous, of this shape and dtype, on the device of `like`."""
    if (
        tuple(tensor.shape) != shape
        or tensor.dtype != dtype
        or tensor.device != like.device
        or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"{name}: expected a contiguous {dtype} tensor of shape {shape} on {like.device}, got {tensor.dtype}, "
            f"{tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
        )


def _narrow_outputs(
    z: torch.Tensor, shift: torch.Tensor, k: int, widths: list[int]
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """New tensors for fit_narrow: z, shift, weights, biases, lsd, jitter, winner, readout, status."""
    layers = len(widths) - 1
    weights = sum(widths[i] * widths[i + 1] for i in range(layers))
    return (
        torch.empty_like(z),
        torch.empty_like(shift),
        z.new_empty(weights),
        z.new_empty(sum(widths[1:])),
        z.new_empty(layers + 1),
        z.new_empty(layers + 1),
        z.new_empty(layers, dtype=torch.int64),
        z.new_empty((widths[-1] + 1, k)),
        z.new_empty(1, dtype=torch.int64),
    )


@torch.library.custom_op("platonic::fit_narrow", mutates_args=())
def fit_narrow(
    z: torch.Tensor,
    shift: torch.Tensor,
    targets: torch.Tensor,
    y_stats: torch.Tensor,
    normals: torch.Tensor,
    rows: int,
    widths: list[int],
    n_tries: int,
    activation: str,
    alpha: float,
    beta: float,
    bias_scale: float,
    l2: float,
    jitter: float,
    relative: bool,
    weighted: bool,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """Fit thin layers; the arguments and results are those of struct FitNarrow in csrc/platonic/fit_narrow.h.

    Returns z, shift (the state after the last layer), weights, biases, lsd, jitter, winner, readout, status.
    """
    panels, width_max, k = -(-rows // NARROW_PANEL), z.shape[1] if z.dim() == 3 else 0, y_stats.numel() - 2
    if rows < 1 or n_tries < 1 or not 1 <= k <= NARROW_MAX_WIDTH:
        raise ValueError(
            f"fit_narrow: expected rows >= 1, n_tries >= 1 and 1 to {NARROW_MAX_WIDTH} targets, "
            f"got {rows}, {n_tries} and {k}"
        )
    if not widths or min(widths) < 1 or max(widths) > min(width_max, NARROW_MAX_WIDTH):
        raise ValueError(
            f"fit_narrow: expected widths from 1 to {min(width_max, NARROW_MAX_WIDTH)}, the columns of z, got {widths}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"fit_narrow: expected an activation of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _expect("z", z, (panels, width_max, NARROW_PANEL), z)
    _expect("shift", shift, (width_max,), z)
    _expect("targets", targets, (panels, k + 1, NARROW_PANEL), z)
    _expect("y_stats", y_stats, (k + 2,), z)
    draws = sum(n_tries * (1 + widths[i] + k) * widths[i + 1] for i in range(len(widths) - 1))
    _expect("normals", normals, (draws,), z)
    outputs = _narrow_outputs(z, shift, k, widths)
    outputs[0].copy_(z)
    outputs[1].copy_(shift)
    scratch = None
    if z.device.type == "cuda":
        scratch = z.new_empty(_kernels.narrow_scratch_size(rows, k, width_max, n_tries))
    new_z, new_shift, *results = outputs
    tensors = [new_z, new_shift, targets, y_stats, normals, *results]
    _kernels.fit_narrow(
        rows,
        k,
        n_tries,
        width_max,
        widths,
        ACTIVATIONS[activation],
        [alpha, beta, bias_scale, l2, jitter],
        relative,
        weighted,
        [tensor.data_ptr() for tensor in tensors],
        0 if scratch is None else scratch.data_ptr(),
        *_where(z),
    )
    return outputs


@fit_narrow.register_fake
def _(z, shift, targets, y_stats, normals, rows, widths, *options):
    return _narrow_outputs(z, shift, y_stats.shape[0] - 2, widths)

def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(
    tensor: torch.Tensor | None, name: str, shape: tuple[int, ...], like: torch.Tensor, op: str
) -> torch.Tensor | None:
    """`tensor`, contiguous, after checking that it has `shape` and the dtype and device of `like`."""
    if tensor is None:
        return None
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: expected {name} of shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{op}: expected {name} of {like.dtype} on {like.device} like x, got {tensor.dtype} on {tensor.device}"
        )
    return tensor.contiguous()


def _check_rows(x: torch.Tensor, op: str) -> torch.Tensor:
    """`x` [m, n], float32 or float64, with contiguous columns (rows may be any distance apart)."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: expected x of float32 or float64, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"{op}: expected x of 2 dimensions [rows, columns], got shape {tuple(x.shape)}")
    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        return x.contiguous() if x.stride(0) != 0 else x.clone(memory_format=torch.contiguous_format)
    return x


# ---- gram ----


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
    x = _check_rows(x, "gram")
    m, n = x.shape
    if activation not in _kernels.activations:
        raise ValueError(f"gram: expected an activation of {sorted(_kernels.activations)}, got {activation!r}")
    if weight is None and (bias is not None or activation != "identity"):
        raise ValueError("gram: bias and activation belong to a fused layer, so they need weight")
    if (x_mean is None) != (x_scale is None):
        raise ValueError("gram: expected both x_mean and x_scale or neither")
    width = n if weight is None else weight.shape[-1]
    targets = 0 if y is None else y.shape[-1]
    weight = _check(weight, "weight", (n, width), x, "gram")
    bias = _check(bias, "bias", (width,), x, "gram")
    x_mean = _check(x_mean, "x_mean", (n,), x, "gram")
    x_factor = None if x_scale is None else _check(x_scale, "x_scale", (n,), x, "gram").reciprocal()
    y = _check(y, "y", (m, targets), x, "gram")
    sample_weight = _check(sample_weight, "sample_weight", (m,), x, "gram")
    p = width + targets
    if p == 0:
        raise ValueError("gram: expected at least one column of [z | y], got none")
    gram = torch.empty(p, p, dtype=torch.float64, device=x.device)
    mean = torch.empty(p, dtype=torch.float64, device=x.device)
    total = torch.empty((), dtype=torch.float64, device=x.device)
    z = torch.empty((m, width) if return_z else (0, width), dtype=x.dtype, device=x.device)
    scratch = None
    if x.device.type == "cuda":
        scratch = torch.empty(_kernels.gram_scratch_bytes(m, p), dtype=torch.uint8, device=x.device)
    _kernels.gram(
        x.dtype == torch.float64, m, n, x.stride(0), x.data_ptr(), _pointer(x_mean), _pointer(x_factor),
        _pointer(weight), _pointer(bias), _kernels.activations[activation], width, _pointer(y), targets,
        _pointer(sample_weight), z.data_ptr() if return_z else 0, gram.data_ptr(), mean.data_ptr(), total.data_ptr(),
        _pointer(scratch), *_where(x),
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


# ---- sorted_pca ----


def _check_joined(x: torch.Tensor, y: torch.Tensor | None, op: str) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """x, y of one dtype and device with as many rows, and the width of [x | y]."""
    x = _check_rows(x, op)
    targets = 0 if y is None else y.shape[-1]
    return x, _check(y, "y", (x.shape[0], targets), x, op), x.shape[1] + targets


@torch.library.custom_op("platonic::centred_product", mutates_args=())
def centred_product(
    x: torch.Tensor,
    shift: torch.Tensor,
    vectors: torch.Tensor,
    y: torch.Tensor | None = None,
    sample_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_i w_i (v_i - shift) ((v_i - shift) . vectors[b]) [b, p] and sum_i w_i (v_i - shift) [p], both float64.

    v = [x | y] [m, p]; shift [p], vectors [b, p] with 1 <= b <= 4, y [m, k] and sample_weight [m] have x's dtype.
    """
    x, y, p = _check_joined(x, y, "centred_product")
    count = vectors.shape[0]
    if not 1 <= count <= _kernels.max_product_vectors:
        raise ValueError(f"centred_product: expected 1 to {_kernels.max_product_vectors} vectors, got {count}")
    shift = _check(shift, "shift", (p,), x, "centred_product")
    vectors = _check(vectors, "vectors", (count, p), x, "centred_product")
    sample_weight = _check(sample_weight, "sample_weight", (x.shape[0],), x, "centred_product")
    product = torch.empty(count, p, dtype=torch.float64, device=x.device)
    sums = torch.empty(p, dtype=torch.float64, device=x.device)
    scratch = None
    if x.device.type == "cuda":
        scratch = torch.empty(_kernels.product_slices(x.shape[0]), count + 1, p, dtype=torch.float64, device=x.device)
    _kernels.centred_product(
        x.dtype == torch.float64, x.shape[0], x.shape[1], x.stride(0), x.data_ptr(), _pointer(y), p - x.shape[1],
        _pointer(sample_weight), shift.data_ptr(), vectors.data_ptr(), count, product.data_ptr(), sums.data_ptr(),
        _pointer(scratch), *_where(x),
    )  # fmt: skip
    return product, sums


@centred_product.register_fake
def _(x, shift, vectors, y=None, sample_weight=None):
    return vectors.new_empty(vectors.shape, dtype=torch.float64), shift.new_empty(shift.shape, dtype=torch.float64)


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
    _kernels.project_rows(
        x.dtype == torch.float64, x.shape[0], x.shape[1], x.stride(0), x.data_ptr(), _pointer(y), p - x.shape[1],
        shift.data_ptr(), direction.data_ptr(), out.data_ptr(), *_where(x),
    )  # fmt: skip
    return out


@project_rows.register_fake
def _(x, shift, direction, y=None):
    return x.new_empty((x.shape[0],), dtype=torch.float64)
