"""Op that fits many thin layers."""

from __future__ import annotations

import torch

from platonic._ops._entry import kernels, where

ACTIVATIONS: dict[str, int] = dict(kernels.activations)
NARROW_PANEL: int = kernels.narrow_panel
NARROW_MAX_WIDTH: int = kernels.narrow_max_width


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
        scratch = z.new_empty(kernels.narrow_scratch_size(rows, k, width_max, n_tries))
    new_z, new_shift, *results = outputs
    tensors = [new_z, new_shift, targets, y_stats, normals, *results]
    kernels.fit_narrow(
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
        *where(z),
    )
    return outputs


@fit_narrow.register_fake
def _(z, shift, targets, y_stats, normals, rows, widths, *options):
    return _narrow_outputs(z, shift, y_stats.shape[0] - 2, widths)
