"""How much memory a training step takes: counted as it runs, on the CPU storage by storage, on CUDA by the allocator."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

__all__ = ["MemoryUse", "Meter", "measure_memory", "open_meter", "saved_bytes", "tensor_bytes"]


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Where a tensor's values lie: one storage, or several of a sparse tensor or of one that wraps others."""
    if isinstance(tensor, FakeTensor):  # of which every attribute would go through its mode
        return [tensor.untyped_storage()]
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [s for name in names for s in storages_of(getattr(tensor, name))]
    if tensor.layout == torch.sparse_coo:
        return [*storages_of(tensor._indices()), *storages_of(tensor._values())]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [s for t in (tensor.crow_indices(), tensor.col_indices(), tensor.values()) for s in storages_of(t)]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [s for t in (tensor.ccol_indices(), tensor.row_indices(), tensor.values()) for s in storages_of(t)]
    return [tensor.untyped_storage()]


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    return sum({s._cdata: s.nbytes() for t in tensors for s in storages_of(t)}.values())


def saved_bytes(call: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of `call`, each once, without those of `exclude`.

    What a checkpoint (``torch.utils.checkpoint``) keeps is what enters it.
    """
    left_out = {s._cdata for t in exclude for s in storages_of(t)}
    kept: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def keep(tensor: Tensor) -> Tensor:
        for storage in storages_of(tensor):
            if storage._cdata not in left_out:
                kept[storage._cdata] = weakref.ref(storage)  # an address that is used again replaces its dead owner
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    alive = [storage for storage in (ref() for ref in kept.values()) if storage is not None]
    del result
    return sum(storage.nbytes() for storage in alive)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes.

    Attributes
    ----------
    peak : int
        Most that was alive at once beyond what was before: activations, temporaries, gradients, and optimiser state made
        meanwhile.
    resident : int
        What was there before, of what was named: parameters, buffers, optimiser state.
    """

    peak: int
    resident: int

    @property
    def total(self) -> int:
        return self.peak + self.resident


class Meter:
    """Counts bytes while it is open, from 0 when it was opened.

    Attributes
    ----------
    live : int
        Now; below 0 once more was freed than made.
    peak : int
        Most so far, at least 0.
    """

    def __init__(self) -> None:
        self._before = 0  # peak up to the last mark

    def __enter__(self) -> Any:
        raise NotImplementedError

    def __exit__(self, *error: Any) -> Any:
        raise NotImplementedError

    @property
    def live(self) -> int:
        raise NotImplementedError

    def _peak_since_mark(self) -> int:
        raise NotImplementedError

    def _restart_peak(self) -> None:
        raise NotImplementedError

    @property
    def peak(self) -> int:
        return max(self._before, self._peak_since_mark(), 0)

    def mark(self) -> int:
        """Most since the last mark, or since the meter was opened; the next one counts from now."""
        since = self._peak_since_mark()
        self._before = max(self._before, since)
        self._restart_peak()
        return since


class _StorageMeter(TorchDispatchMode, Meter):
    """Adds up the bytes of the storages that operations make, less those that were freed.

    Storages die in whatever thread drops them last, also in the middle of what is done here. So their deaths only queue up,
    and are counted before the next storage is. Fake tensors count among fake ones only, and those on the device "meta" never.
    """

    def __init__(self, resident: Iterable[Tensor]) -> None:
        Meter.__init__(self)
        TorchDispatchMode.__init__(self)
        self._live = self._peak = 0
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._dead: deque[int] = deque()
        resident = list(resident)
        self._fake = any(isinstance(t, FakeTensor) for t in resident)
        for tensor in resident:
            self._meet(tensor, new=False)

    @property
    def live(self) -> int:
        self._bury()
        return self._live

    def _peak_since_mark(self) -> int:
        return self._peak

    def _restart_peak(self) -> None:
        self._peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._bury()
        fresh = func is torch.ops.aten.lift_fresh.default  # torch.tensor(...): the argument is what was made
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._meet(leaf, new=fresh)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf, new=True)
        self._peak = max(self._peak, self._live)
        return result

    def _meet(self, tensor: Tensor, new: bool) -> None:
        """Count a storage that was made, or grew or shrank; remember one that was there before, to notice its end."""
        if isinstance(tensor, FakeTensor) != self._fake or (not self._fake and tensor.is_meta):
            return
        for storage in storages_of(tensor):
            key, size = storage._cdata, storage.nbytes()
            if key not in self._sizes:
                self._sizes[key] = size
                self._alive[key] = weakref.ref(storage, lambda _, key=key: self._dead.append(key))  # type: ignore[misc]
                self._live += size if new else 0
            elif size != self._sizes[key]:
                self._live += size - self._sizes[key]
                self._sizes[key] = size

    def _bury(self) -> None:
        while self._dead:
            key = self._dead.popleft()
            del self._alive[key]
            self._live -= self._sizes.pop(key)


class _CudaMeter(Meter):
    """The allocator's own counts. Its peak is one per device, so meters inside others share it through `_open`."""

    _open: ClassVar[list[_CudaMeter]] = []

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._at_start = 0
        self._seen = 0

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated(self.device) - self._at_start

    def _peak_since_mark(self) -> int:
        self._gather()
        return self._seen - self._at_start

    def _restart_peak(self) -> None:
        self._seen = torch.cuda.memory_allocated(self.device)

    def _gather(self) -> None:
        """Hand the allocator's peak to every open meter and begin a new one."""
        seen = torch.cuda.max_memory_allocated(self.device)
        for meter in self._open:
            if meter.device == self.device:
                meter._seen = max(meter._seen, seen)
        torch.cuda.reset_peak_memory_stats(self.device)

    def __enter__(self) -> _CudaMeter:
        torch.cuda.synchronize(self.device)
        self._gather()
        self._at_start = self._seen = torch.cuda.memory_allocated(self.device)
        self._open.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.synchronize(self.device)
        self._gather()
        self._open.remove(self)


def open_meter(resident: Iterable[Tensor] = (), device: torch.device | str | None = None) -> Meter:
    """A :class:`Meter`, to be used in a ``with`` statement. Arguments as in :func:`measure_memory`."""
    kept = list(resident)
    if device is None:
        device = next((t.device for t in kept if t.is_cuda), torch.device("cpu"))
    device = torch.device(device)
    if device.type != "cuda" or any(isinstance(t, FakeTensor) for t in kept):
        return _StorageMeter(kept)
    return _CudaMeter(device if device.index is not None else torch.device("cuda", torch.cuda.current_device()))


def measure_memory(
    step: Callable[[], Any], resident: Iterable[Tensor] = (), *, device: torch.device | str | None = None
) -> MemoryUse:
    """Run `step` once and count the most memory that it had at once.

    Parameters
    ----------
    step : callable
        A training step, or a part of one.
    resident : iterable of Tensor
        What was there before and counts: parameters, buffers, optimiser state. Each storage counts once, however many views
        of it there are.
    device : device, optional
        Whose memory is measured; None means that of the first CUDA tensor of `resident`, or else the CPU.

    Returns
    -------
    MemoryUse
        On CUDA, from the allocator's peak, which holds what kernels need for themselves. Elsewhere, from the storages that
        operations made and that were not yet freed: what an allocator without overhead would need. Scratch memory inside a
        kernel is not in that; nor is what threads allocate that `step` starts itself (those of autograd are). A storage
        that ``resize_`` changes counts with its new size from the next operation on it.

    Notes
    -----
    The state that an optimiser makes in its first step counts as made by that step. For the figure of every later step,
    measure the second one, with the state among `resident`.
    """
    kept = list(resident)
    before, meter = tensor_bytes(kept), open_meter(kept, device)
    del kept, resident  # so that the step may free them
    with meter:
        step()
    return MemoryUse(meter.peak, before)
