"""The codec's CUDA functions on the CPU."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack

from cuda_emulation.library import Emulated
from platonic_core import _C
from weight_compression.codec import compress_bound
from weight_compression.payload import DTYPES


class EmulatedCodec(Emulated):
    """What ``platonic_core._C.weight_compression`` has for CUDA devices, on the CPU."""

    def __init__(self, library: ctypes.CDLL):
        i, n, d, p = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
        super().__init__(library, _C.weight_compression)
        library.compress_scratch_bytes.restype, library.compress_scratch_bytes.argtypes = n, [i, n, n, i, n, n]
        library.decompress_scratch_bytes.restype, library.decompress_scratch_bytes.argtypes = n, [i, n, n]
        library.compress_on_device.argtypes = [i, n, n, p, i, p, i, n, n, i, i, d, i, d, i, p, p, p]
        library.decompress_on_device.argtypes = [p, n, i, n, n, p, i, p, i, d, i, p, p]

    def compress_scratch_bytes(self, dtype: int, item: int, n: int, way: int, group_size: int, cut: int) -> int:
        return self.library.compress_scratch_bytes(dtype, item, n, way, group_size, cut)

    def decompress_scratch_bytes(self, dtype: int, item: int, n: int) -> int:
        return self.library.decompress_scratch_bytes(dtype, item, n)

    def compress_on_device(self, dtype, item, n, x, sizes, way, group_size, cut, keep, rule, value, bits, fraction,
                           sampled, out, size, scratch, device, threads, stream):  # fmt: skip
        room = compress_bound(n, DTYPES[dtype], len(sizes))
        shape = (ctypes.c_int64 * len(sizes))(*sizes)
        with ExitStack() as stack:
            x = self.guard(stack, x, n * item)
            out = self.guard(stack, out, room, write=True)
            size = self.guard(stack, size, 8, read=False, write=True)
            scratch_bytes = self.compress_scratch_bytes(dtype, item, n, way, group_size, cut)
            scratch = self.guard(stack, scratch, scratch_bytes, read=False)
            self.call(self.library.compress_on_device, dtype, item, n, x, len(sizes), shape, way, group_size, cut,
                      keep, rule, value, bits, fraction, sampled, out, size, scratch)  # fmt: skip

    def decompress_on_device(self, payload, size, dtype, item, n, out, sizes, accumulate, scale, check, status,
                             scratch, device, threads, stream):  # fmt: skip
        shape = (ctypes.c_int64 * len(sizes))(*sizes)
        with ExitStack() as stack:
            payload = self.guard(stack, payload, size)
            out = self.guard(stack, out, n * item, write=True)
            status = self.guard(stack, status, 4, read=False, write=True)
            scratch_bytes = self.decompress_scratch_bytes(dtype, item, n)
            scratch = self.guard(stack, scratch, scratch_bytes, read=False)
            self.call(self.library.decompress_on_device, payload, size, dtype, item, n, out, len(sizes), shape,
                      accumulate, scale, check, status, scratch)  # fmt: skip
