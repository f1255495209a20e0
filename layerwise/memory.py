"""How much memory a training step takes: counted as it runs, item by item, and the budget that it must keep."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["MemoryUse", "measure_memory", "saved_bytes"]


def saved_bytes(call: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of `call`, each once, without those of `exclude`."""
    left_out = {t.untyped_storage().data_ptr() for t in exclude}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()  # alive, so that no storage is freed and its address used again
    del result
    return sum(storages.values())


@dataclass(frozen=True)
class MemoryUse:
    """Bytes.

    Attributes
    ----------
    peak : int
        Most that was alive at once beyond what was before the step: activations, temporaries, gradients and optimiser state
        that the step made.
    resident : int
        Alive before the step, of what `resident` named: parameters, buffers, optimiser state.
    """

    peak: int
    resident: int

    @property
    def total(self) -> int:
        return self.peak + self.resident


class _LiveStorages(TorchDispatchMode):
    """Adds up the bytes of the storages that operations make, less those that were freed."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in known}
        self._mine: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._meet(leaf, new=False)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf, new=True)
        return result

    def _meet(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._mine:
            return
        if not new:
            self._known.add(key)  # it was there before the step
            return
        size = storage.nbytes()
        self._mine.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._mine.discard(key)
        self.live -= size


@contextlib.contextmanager
def _cuda_peak(device: torch.device, out: list[int]) -> Iterator[None]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    torch.cuda.synchronize(device)
    out.append(torch.cuda.max_memory_allocated(device) - before)


def measure_memory(step: Callable[[], Any], resident: Iterable[Tensor] = ()) -> MemoryUse:
    """Run `step` once and count the most memory that it had at once.

    Parameters
    ----------
    step : callable
        A training step, or a part of one.
    resident : iterable of Tensor
        What was there before and counts: parameters, buffers, optimiser state. Each storage counts once. A CUDA tensor among
        them, or else the current default device, decides which device is measured.

    Returns
    -------
    MemoryUse
        On CUDA, from the allocator's peak. On the CPU, from the storages that operations made and had not yet freed, which is
        what an allocator without overhead would need; scratch memory inside a kernel is not seen.
    """
    kept = list(resident)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    device = next((t.device for t in kept if t.is_cuda), None)
    if device is not None:
        peak: list[int] = []
        with _cuda_peak(device, peak):
            step()
        return MemoryUse(peak[0], sum(sizes.values()))
    with _LiveStorages(kept) as live:
        result = step()
    del result
    return MemoryUse(live.peak, sum(sizes.values()))
