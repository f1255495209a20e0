"""Where arrays of other libraries enter and results leave again.

:func:`to_torch` takes NumPy and CuPy arrays, torch tensors and anything else that speaks DLPack or converts to NumPy,
and returns a tensor that shares the caller's memory where the layout allows, plus the :class:`Origin` that brings
results back: same library, same device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Origin", "library_of", "to_torch"]


def library_of(array: Any) -> str:
    """Name of the library that `array` belongs to: 'torch', 'numpy', 'cupy', or the array API namespace's name."""
    if isinstance(array, torch.Tensor):
        return "torch"
    if isinstance(array, np.ndarray):
        return "numpy"
    namespace = getattr(array, "__array_namespace__", None)
    if namespace is not None:
        return namespace().__name__.split(".")[0]
    return "numpy"


@dataclass(frozen=True)
class Origin:
    """The library and device that an array came from.

    Attributes
    ----------
    library : str
        'numpy', 'torch', 'cupy', or the name of another array API namespace.
    device : torch.device
        Where the tensor made from the array lives.
    namespace, array_device : Any
        The array API namespace and device of an array of a library other than NumPy and torch, else None.
    """

    library: str
    device: torch.device
    namespace: Any = None
    array_device: Any = None

    def back(self, tensor: torch.Tensor) -> Any:
        """`tensor` in the library and on the device of the origin, without a copy where that is possible."""
        tensor = tensor.detach().to(self.device)
        if self.library == "torch":
            return tensor
        if self.library == "numpy":
            return tensor.cpu().numpy()
        array = self.namespace.from_dlpack(tensor.contiguous())
        return array if array.device == self.array_device else array.to_device(self.array_device)

    def asarray(self, values: Any) -> Any:
        """NumPy array `values` in the library and on the device of the origin (strings stay in NumPy)."""
        values = np.asarray(values)
        if self.library == "numpy" or values.dtype.kind not in "biufc":
            return values
        return self.back(torch.from_numpy(np.ascontiguousarray(values)))


def to_torch(array: Any) -> tuple[torch.Tensor, Origin]:
    """`array` as a tensor, and where it came from.

    Shares memory where DLPack can describe it. NumPy arrays that torch cannot share (negative strides, foreign byte
    order, read-only memory) are copied once, and so are long doubles, which become float64.

    Raises
    ------
    TypeError
        If the array's dtype has no torch counterpart (strings, objects).
    """
    library = library_of(array)
    if library == "torch":
        return array.detach(), Origin("torch", array.device)
    if library == "numpy":
        return _numpy_to_torch(np.asarray(array)), Origin("numpy", torch.device("cpu"))
    tensor = _dlpack_to_torch(array)
    return tensor, Origin(library, tensor.device, array.__array_namespace__(), array.device)


def _numpy_to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind not in "biufc":
        raise TypeError(f"expected a numeric array, got dtype {array.dtype}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype in (np.longdouble, np.clongdouble):
        array = array.astype(np.float64 if array.dtype == np.longdouble else np.complex128)
    if not array.flags.writeable or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def _dlpack_to_torch(array: Any) -> torch.Tensor:
    try:
        return torch.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError):
        return _numpy_to_torch(np.asarray(array))
