"""Deep networks of thin layers, fitted in closed form in one native call.

:func:`fit_narrow` is for thousands of layers of a few units each, where the general path
would spend its time between the layers rather than in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from platonic import _ops
from platonic_core.arrays import Origin, to_torch

__all__ = ["NarrowNetwork", "fit_narrow"]

_SEGMENT_DRAWS = 1 << 20  # normals drawn at a time: 8 MiB, and a fraction of a second between two looks at the user


@dataclass(frozen=True)
class NarrowNetwork:
    """A fitted network of thin layers: Z_i = act(Z_{i-1} W_i + b_i), then a linear read-out.

    Attributes
    ----------
    weights : list of array, (h_in, h_out)
        W of each layer, float64.
    biases : list of array, (h_out,)
        b of each layer, float64.
    coef : array, (h_last, k)
        Coefficients of the read-out of the last layer.
    intercept : array, (k,)
        Its intercept.
    lsd : array, (n_layers + 1,)
        Least squares distance ||Y - read-out of Z_i||_F^2 / m (with sample weights: weighted, over their sum) on the
        training data; entry 0 belongs to the input. Where columns are nearly dependent, what pivots close to rounding
        explain is not counted (1 - 32 width eps / pivot of it is), so it can be too high there, and seldom too low.
    jitter : array, (n_layers + 1,)
        What had to be added to the unit diagonal of the equations behind that LSD to factor them: 0 except where the
        representation was rank-deficient to rounding.
    winners : array of int64, (n_layers,)
        Which try was kept.
    representation : array, (m, h_last)
        The training data after the last layer.
    activation : str
        The activation of all layers.
    """

    weights: list[Any]
    biases: list[Any]
    coef: Any
    intercept: Any
    lsd: Any
    jitter: Any
    winners: Any
    representation: Any
    activation: str

    @property
    def n_jittered(self) -> int:
        """How many representations were rank-deficient to rounding."""
        return int((self.jitter > 0).sum())

    def predict(self, X: Any) -> Any:
        """Read-out of the last layer for new rows: (m, k) float64, in the library and on the device of `X`."""
        tensor, origin = to_torch(X)
        width = len([*self.weights, self.coef][0])
        if tensor.dim() != 2 or tensor.shape[1] != width or tensor.is_complex():
            raise ValueError(f"expected real X of shape (m, {width}), got {tensor.dtype} {tuple(tensor.shape)}")
        z = tensor.to(torch.float64)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            z = _ACTIVATE[self.activation](torch.addmm(_as(bias, z), z, _as(weight, z)))
        return origin.back(torch.addmm(_as(self.intercept, z), z, _as(self.coef, z)))


_ACTIVATE = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "abs": torch.abs,
    "tanh": torch.tanh,
    "celu": torch.nn.functional.celu,
}


def _as(values: Any, like: torch.Tensor) -> torch.Tensor:
    return to_torch(values)[0].to(like.device)


def fit_narrow(
    X: Any,
    Y: Any,
    widths: Sequence[int],
    *,
    activation: str = "celu",
    alpha: float = 1.0,
    beta: float = 1.0,
    n_tries: int = 1,
    l2: float = 0.0,
    scaling: str = "relative",
    bias_scale: float = 1.0,
    jitter: float = 1e-14,
    sample_weight: Any = None,
    random_state: int | np.random.Generator | None = None,
    verbose: bool = False,
) -> NarrowNetwork:
    """Fit a deep network of thin layers to Y in closed form, layer by layer.

    Layer i takes the representation Z (m, h_in), at first X, and the ridge read-out B = (Zc'Zc + l2 I)^-1 Zc'Yc of the
    targets from it (columns centred by their means zbar and ybar). For a draw P = [p_1; P_Z; P_Y] of standard normals
    with 1 + h_in + k rows it sets

    - ``scaling="absolute"``: W = alpha (P_Z + beta B P_Y), b = alpha (p_1 + beta (ybar - zbar B) P_Y): the least
      squares solution for the target alpha [1 Z | beta Y] P, as in the thesis, alpha, beta and l2 taken literally;
    - ``scaling="relative"``: with Zt the standardised columns of Z, unit j has the pre-activation
      alpha / sqrt(1 + beta^2) (Zt p / std(Zt p) + beta Zt B q / std(Zt B q)) + alpha bias_scale p_1,
      p and q being columns j of P_Z and P_Y. Pre-activations have standard deviation about alpha whatever the data,
      the width and the depth, and l2 is per row of standardised data.

    Of `n_tries` draws the one with the least squares distance lowest after the activation is kept.

    Parameters
    ----------
    X : array, (m, n), n <= 64
        Data: NumPy, torch or DLPack; computed in float64 whatever its dtype, on its device.
    Y : array, (m,) or (m, k), k <= 64
        Targets: numbers, or classes as one column each (one-hot).
    widths : sequence of int
        Units of each layer, 1 to 64 each.
    activation : {"celu", "relu", "abs", "tanh", "identity"}
    alpha, beta, l2, bias_scale : float
        See above. A depth of thousands with ``scaling="absolute"`` needs alpha small enough that representations do
        not grow from layer to layer.
    n_tries : int
        Draws per layer.
    jitter : float
        First value tried on the diagonal of the (unit-diagonal) equations when they cannot be factored; grows tenfold.
        Where that happened is reported in the result.
    sample_weight : array, (m,), optional
        Weights of the rows, non-negative. A weight of 2 counts a row twice.
    random_state : int, Generator or None
        Source of P. An int s stands for ``numpy.random.Generator(PCG64(s))``; for layer i it is asked for
        ``standard_normal((n_tries, 1 + h_in + k, h_out))``, so that other code can draw the same.
    verbose : bool
        Show a progress bar.

    Returns
    -------
    NarrowNetwork
        Weights, read-out and scores, in the library and on the device of `X`.

    Raises
    ------
    ValueError
        For wrong shapes, non-finite data, widths outside 1 to 64, or unknown names.
    FloatingPointError
        If a representation overflows; the message names the layer.

    Notes
    -----
    Thesis, sections 7.3.2 and 7.5, equation 7.2. On the CPU results do not depend on the number of threads.
    """
    X, Y, weight, origin = _check_data(X, Y, sample_weight)
    widths = _check_widths(X, Y, widths)
    options = _check_options(activation, scaling, n_tries, alpha, beta, bias_scale, l2, jitter)
    rng = random_state if isinstance(random_state, np.random.Generator) else _generator(random_state)
    k, m = Y.shape[1], X.shape[0]
    z, shift = _pack(X, max(widths), weight)
    targets, y_stats = _pack_targets(Y, weight)
    parts: list[tuple[torch.Tensor, ...]] = []
    with tqdm(total=len(widths) - 1, desc="layers", disable=not verbose) as progress:
        for segment in _segments(widths, n_tries, k):
            normals = torch.from_numpy(_draw(rng, segment, n_tries, k)).to(X.device)
            z, shift, *results = _ops.fit_narrow(
                z, shift, targets, y_stats, normals, m, segment, n_tries, activation, *options, weight is not None
            )
            _check_status(int(results[-1]), sum(part[4].numel() for part in parts))
            parts.append(tuple(results))
            progress.update(len(segment) - 1)
    representation = _unpack(z, shift, m, widths[-1])
    return _assemble(parts, widths, representation, activation, origin)


def _generator(seed: int | None) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _check_data(X: Any, Y: Any, sample_weight: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Origin]:
    x, origin = to_torch(X)
    y = to_torch(Y)[0].to(x.device)
    if x.is_complex() or y.is_complex():
        raise ValueError(f"expected real numbers in X and Y, got {x.dtype} and {y.dtype}")
    x, y = x.to(torch.float64), y.to(torch.float64)
    if y.dim() == 1:
        y = y[:, None]
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] != y.shape[0] or x.shape[0] < 1:
        raise ValueError(
            "expected X of shape (m, n) and Y of shape (m,) or (m, k) with the same m >= 1, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    for name, data in (("X", x), ("Y", y)):
        if not 1 <= data.shape[1] <= _ops.NARROW_MAX_WIDTH:
            raise ValueError(f"expected {name} with 1 to {_ops.NARROW_MAX_WIDTH} columns, got {data.shape[1]}")
        if not bool(torch.isfinite(data).all()):
            raise ValueError(f"{name} contains NaN or infinity; remove or impute such rows")
    if sample_weight is None:
        return x, y, None, origin
    weight = to_torch(sample_weight)[0].to(x.device, torch.float64)
    if weight.shape != x.shape[:1]:
        raise ValueError(f"expected sample_weight of shape ({x.shape[0]},), got {tuple(weight.shape)}")
    if not bool((torch.isfinite(weight) & (weight >= 0)).all()) or not float(weight.sum()) > 0:
        raise ValueError("sample_weight must be finite and non-negative, with a positive sum")
    return x, y, weight, origin


def _check_widths(X: torch.Tensor, Y: torch.Tensor, widths: Sequence[int]) -> list[int]:
    layers = [int(width) for width in widths]
    if not layers or min(layers) < 1 or max(layers) > _ops.NARROW_MAX_WIDTH or layers != list(widths):
        raise ValueError(f"expected at least one width, whole numbers from 1 to {_ops.NARROW_MAX_WIDTH}, got {widths}")
    return [X.shape[1], *layers]


def _check_options(
    activation: str, scaling: str, n_tries: int, alpha: float, beta: float, bias_scale: float, l2: float, jitter: float
) -> tuple[float, float, float, float, float, bool]:
    if activation not in _ops.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ops.ACTIVATIONS)}, got {activation!r}")
    if scaling not in ("relative", "absolute"):
        raise ValueError(f"scaling must be 'relative' or 'absolute', got {scaling!r}")
    if n_tries < 1:
        raise ValueError(f"n_tries must be at least 1, got {n_tries}")
    for name, value in (("l2", l2), ("jitter", jitter)):
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and non-negative, got {value}")
    for name, value in (("alpha", alpha), ("beta", beta), ("bias_scale", bias_scale)):
        if not np.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    return float(alpha), float(beta), float(bias_scale), float(l2), float(jitter), scaling == "relative"


def _check_status(status: int, layers_before: int) -> None:
    if status >= 0:
        raise FloatingPointError(
            f"layer {layers_before + status} of the network (0: its input) is not finite in float64 for any try: "
            "representations grow from layer to layer. Lower alpha or beta, or use scaling='relative'."
        )


def _panels(columns: torch.Tensor) -> torch.Tensor:
    """(m, c) to panels [ceil(m / R), c, R] of R rows, padded with zeros: the layout of fit_narrow.h."""
    m, count = columns.shape
    panels = -(-m // _ops.NARROW_PANEL)
    padded = columns.new_zeros((panels * _ops.NARROW_PANEL, count))
    padded[:m] = columns
    return padded.view(panels, _ops.NARROW_PANEL, count).transpose(1, 2).contiguous()


def _column_sums(columns: torch.Tensor) -> torch.Tensor:
    """Sums over rows, in an order that does not depend on the number of threads, as torch's on the CPU does."""
    if columns.device.type != "cpu":
        return columns.sum(0)
    return torch.from_numpy(_panels(columns).numpy().sum(2).sum(0))


def _pack(X: torch.Tensor, width_max: int, weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """X as panels of width_max columns, minus the column means, and these."""
    w = X.new_ones(X.shape[0]) if weight is None else weight
    shift = X.new_zeros(width_max)
    shift[: X.shape[1]] = _column_sums(w[:, None] * X) / _column_sums(w[:, None])
    columns = X.new_zeros((X.shape[0], width_max))
    columns[:, : X.shape[1]] = X - shift[: X.shape[1]]
    return _panels(columns), shift


def _pack_targets(Y: torch.Tensor, weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Panels of [w | w (Y - ybar)], and ybar, sum w |y - ybar|^2, sum w."""
    w = Y.new_ones((Y.shape[0], 1)) if weight is None else weight[:, None]
    total = _column_sums(w)
    mean = _column_sums(w * Y) / total
    centred = Y - mean
    square = _column_sums(w * centred * centred).sum()
    return _panels(torch.cat([w, w * centred], 1)), torch.cat([mean, square[None], total])


def _unpack(z: torch.Tensor, shift: torch.Tensor, m: int, width: int) -> torch.Tensor:
    return z[:, :width].transpose(1, 2).reshape(-1, width)[:m] + shift[:width]


def _segments(widths: list[int], n_tries: int, k: int) -> list[list[int]]:
    """Consecutive layers whose draws fit in _SEGMENT_DRAWS, each as [h_in, h_out, h_out, ...]."""
    segments, current, draws = [], [widths[0]], 0
    for h_in, h_out in pairwise(widths):
        size = n_tries * (1 + h_in + k) * h_out
        if len(current) > 1 and draws + size > _SEGMENT_DRAWS:
            segments.append(current)
            current, draws = [h_in], 0
        current.append(h_out)
        draws += size
    return [*segments, current]


def _draw(rng: np.random.Generator, segment: list[int], n_tries: int, k: int) -> np.ndarray:
    pairs = pairwise(segment)
    return np.concatenate([rng.standard_normal((n_tries, 1 + h_in + k, h_out)).ravel() for h_in, h_out in pairs])


def _assemble(
    parts: list[tuple[torch.Tensor, ...]],
    widths: list[int],
    representation: torch.Tensor,
    activation: str,
    origin: Origin,
) -> NarrowNetwork:
    def joined(index: int, skip: int = 0) -> torch.Tensor:
        return torch.cat([part[index][skip if i else 0 :] for i, part in enumerate(parts)])

    weights = joined(0).split([h_in * h_out for h_in, h_out in pairwise(widths)])
    biases = joined(1).split(widths[1:])
    readout = parts[-1][5]
    return NarrowNetwork(
        weights=[origin.back(w.view(h_in, -1)) for w, h_in in zip(weights, widths[:-1], strict=True)],
        biases=[origin.back(b) for b in biases],
        coef=origin.back(readout[:-1]),
        intercept=origin.back(readout[-1]),
        lsd=origin.back(joined(2, skip=1)),
        jitter=origin.back(joined(3, skip=1)),
        winners=origin.back(joined(4)),
        representation=origin.back(representation),
        activation=activation,
    )
