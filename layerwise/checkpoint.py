"""The state of a training run on disk: written whole or not at all, read without running code."""

from __future__ import annotations

import functools
import os
import random
import re
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch

from platonic_core.files import atomic_file

__all__ = ["CheckpointError", "describe", "load_checkpoint", "rng_state", "save_checkpoint", "set_rng_state"]

FORMAT = "platonic layerwise checkpoint"
VERSION = 1


class CheckpointError(RuntimeError):
    """A file that is no checkpoint, or not one of this run."""


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `state` beside `path`, flush it to the disk, and rename it."""
    with atomic_file(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **state}, file)


def load_checkpoint(path: str | os.PathLike[str], device: torch.device) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote.

    Raises
    ------
    FileNotFoundError
        If there is none.
    CheckpointError
        If the file is something else.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: not a checkpoint of layerwise: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of layerwise")
    if state["version"] != VERSION:
        raise CheckpointError(f"{path}: version {state['version']}, expected {VERSION}")
    return state


def describe(value: Any) -> str:
    """What tells a head, a loss or an optimiser from another: settings too, but of functions only the name."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(describe, value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {describe(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, functools.partial):
        return f"partial({describe([value.func, value.args, value.keywords])})"
    if isinstance(value, torch.nn.Module):
        own = {k: v for k, v in vars(value).items() if not k.startswith("_") and k != "training"}
        plain = {k: v for k, v in own.items() if isinstance(v, (int, float, str)) or callable(v)}
        return f"{type(value).__qualname__}({describe({**plain, **dict(value.named_children())})})"
    if isinstance(value, type) or not (is_dataclass(value) or isinstance(value, (int, float, str, type(None)))):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


def rng_state(*generators: torch.Generator | None) -> dict[str, Any]:
    """States of torch's, NumPy's and Python's global generators, and of those given."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - the global one is what loaders draw from
    version, numbers, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(numbers), following],
        "own": [None if g is None else g.get_state() for g in generators],
    }


def set_rng_state(state: dict[str, Any], *generators: torch.Generator | None) -> None:
    """Put the generators where :func:`rng_state` found them."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, numbers, following = state["python"]
    random.setstate((version, tuple(numbers), following))
    for generator, own in zip(generators, state["own"], strict=True):
        if generator is not None and own is not None:
            generator.set_state(own.cpu())
