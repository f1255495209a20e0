"""Step 1b of *fit*: the estimators' parameters, checked once and turned into what :mod:`platonic.network` takes."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from platonic import network
from platonic.activations import resolve_activation
from platonic.network import FitOptions, LayerPlan
from platonic.readout import ReadoutOptions
from platonic.solvers import SOLVERS
from platonic.targets import DETERMINISTIC, PROJECTIONS, TargetOptions

__all__ = ["Settings", "check_against_data", "check_parameters", "compute_device", "progress"]

_FLOAT64_NUMBERS = 2**24  # widest representation (m x width) that float32 data are fitted in float64 for: 128 MiB
_BAR_LAYERS = 20  # more layers than this show a progress bar instead of a line each


@dataclass(frozen=True)
class Settings:
    """plans, options : what the layer walk takes; dtype : torch dtype or None."""

    plans: list[LayerPlan]
    options: FitOptions
    dtype: torch.dtype | None

    def compute_dtype(self, X: torch.Tensor) -> torch.dtype:
        """float64 if X is, or if float32 would save little memory: decided by dtype and shape alone."""
        if self.dtype is not None:
            return self.dtype
        widest = max(X.shape[1], *(plan.width for plan in self.plans))
        return torch.float64 if len(X) * widest <= _FLOAT64_NUMBERS else X.dtype


def check_parameters(estimator: Any) -> Settings:
    """Raises ValueError (or TypeError for a wrong type) naming the parameter, what it takes and what it got."""
    p = estimator
    widths = _widths(p.hidden_layer_sizes)
    relative = _one_of("scaling", p.scaling, ("relative", "absolute")) == "relative"
    projections = _projections(p.projection, len(widths), relative)
    activation = resolve_activation(p.activation)
    if getattr(p, "task", None) is not None:
        _one_of("task", p.task, ("classification", "regression"))
    if p.l2 != "loo":
        _number("l2", p.l2, 0.0, np.inf, also="'loo'")
    if p.tol is not None:
        _number("tol", p.tol, 0.0, 1.0, also="None")
    if p.n_tries is not None:
        _integer("n_tries", p.n_tries, 1)
        if p.n_tries > 1 and DETERMINISTIC.issuperset(projections):
            raise ValueError(
                f"n_tries={p.n_tries} needs a projection that draws: every try of {sorted(set(projections))} is the same."
            )
    target = TargetOptions(
        _number("alpha", p.alpha, 0.0, np.inf, open_low=True), _number("beta", p.beta, 0.0, np.inf), relative,
        _image_shape(p.image_shape),
    )  # fmt: skip
    if target.image_shape is not None and projections[0] not in ("auto", "pairs"):
        raise ValueError(
            "image_shape is used where the first layer's projection is 'auto' or 'pairs'; leave it out for the others."
        )
    readout = ReadoutOptions(
        p.l2 if p.l2 == "loo" else float(p.l2), _one_of("solver", p.solver, tuple(SOLVERS)), p.tol, relative
    )
    options = FitOptions(target, readout, p.n_tries, _number("ema", p.ema, 0.0, 1.0))
    plans = [LayerPlan(width, activation, name) for width, name in zip(widths, projections, strict=True)]
    return Settings(plans, options, _dtype(p.dtype))


def check_against_data(settings: Settings, n_features: int) -> None:
    shape = settings.options.target.image_shape
    if shape is not None and int(np.prod(shape)) != n_features:
        raise ValueError(f"image_shape={shape} has {int(np.prod(shape))} pixels, but X has {n_features} features.")


def compute_device(device: Any, features: torch.Tensor) -> torch.device:
    """The device that the parameter `device` names, or that of the data."""
    if device is None:
        return features.device
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must name a device that torch can use here, got {device!r}: {reason}") from error
    return found


def progress(verbose: bool, plans: Sequence[LayerPlan]) -> network.Observer | None:
    """An observer that prints a line per layer, or moves a bar where there are many; None unless `verbose`."""
    if not verbose:
        return None
    bar: Any = None

    def show(index: int, record: network.LayerRecord, weights: Any, readout: Any) -> None:
        nonlocal bar
        if len(plans) <= _BAR_LAYERS:
            jitter = f"  jitter {record.jitter:.1e}" if record.jitter else ""
            print(
                f"layer {index + 1}/{len(plans)}: {record.width} units, {record.projection}, "
                f"LSD {record.lsd:.3e}, training score {record.score:.4f}, l2 {record.l2:.1e}{jitter}"
            )
            return
        if bar is None:
            bar = tqdm(total=len(plans), unit="layer", file=sys.stderr)
        bar.update()
        bar.set_postfix(lsd=f"{record.lsd:.2e}")
        if index + 1 == len(plans):
            bar.close()

    return show


def _widths(sizes: Any) -> list[int]:
    values = [sizes] if isinstance(sizes, numbers.Integral) else list(np.atleast_1d(np.asarray(sizes, dtype=object)))
    if not values:
        raise ValueError("hidden_layer_sizes must name at least one layer, got none. For a linear model use Ridge.")
    for width in values:
        if isinstance(width, bool | np.bool_) or not isinstance(width, numbers.Integral) or width < 1:
            raise ValueError(f"hidden_layer_sizes must be positive integers, got {sizes!r}.")
    return [int(width) for width in values]


def _projections(projection: Any, layers: int, relative: bool) -> list[str]:
    if not isinstance(projection, str) and not (isinstance(projection, Sequence) or hasattr(projection, "__array__")):
        raise ValueError(f"projection must be a name or a name for each layer, got {projection!r}.")
    names = [projection] * layers if isinstance(projection, str) else list(projection)
    if len(names) != layers:
        raise ValueError(f"projection names {len(names)} layers, but hidden_layer_sizes has {layers}.")
    for name in names:
        _one_of("projection", name, ("auto", *PROJECTIONS))
    return ["random" if name == "auto" and not relative else name for name in names]


def _image_shape(shape: Any) -> tuple[int, ...] | None:
    if shape is None:
        return None
    shape = tuple(shape) if isinstance(shape, Sequence | np.ndarray) else (shape,)
    if len(shape) not in (2, 3):
        raise ValueError(f"image_shape must be (height, width) or (height, width, channels), got {shape!r}.")
    for side in shape:
        _integer("image_shape", side, 1)
    return tuple(int(side) for side in shape)


def _dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None or dtype in (torch.float32, torch.float64):
        return dtype
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32', 'float64' or None, got {dtype!r}.")
    return getattr(torch, name)


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")
    return value


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False, also: str = "") -> float:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    if not real or not np.isfinite(value) or not low <= value <= high or (open_low and value == low):
        span = f"{'(' if open_low else '['}{low:g}, {high:g}{']' if np.isfinite(high) else ')'}"
        raise ValueError(f"{name} must be a number in {span}{f' or {also}' if also else ''}, got {value!r}.")
    return float(value)


def _integer(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}.")
    return int(value)
