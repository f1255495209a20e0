"""Builds the codec's CUDA sources for the CPU and stands in for its bindings.

Every buffer that a kernel gets is copied to memory of exactly its size beside a page that cannot be touched, and back
afterwards; scratch is full of rubbish. See emulation.h for what else is checked.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from platonic_core import _C
from weight_compression.codec import compress_bound
from weight_compression.payload import DTYPES

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-pthread",
         "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]  # fmt: skip


def why_not() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if platform.system() != "Linux":
        return "the emulation needs Linux: ELF sections and makecontext"
    return None if _compiler() else "the emulation needs a C++ compiler: c++, g++, clang++ or CXX"


def _compiler() -> list[str] | None:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    return None


def build(folder: Path) -> ctypes.CDLL:
    """The library, compiled into `folder`: the .cu files as they are, with this folder's cuda_runtime.h before CUDA's."""
    sources = [CSRC / "weight_compression" / "codec.cu", *sorted(HERE.glob("*.cpp"))]
    target = folder / "emulated.so"
    objects = [folder / f"{source.name}.o" for source in sources]
    compiler, includes = _compiler(), [f"-I{HERE}", f"-I{CSRC}"]
    jobs = [
        subprocess.Popen([*compiler, *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(made)])
        for source, made in zip(sources, objects, strict=True)
    ]
    if max(job.wait() for job in jobs) > 0:
        raise RuntimeError("the CUDA sources do not compile for the CPU; the compiler's messages are above")
    subprocess.run([*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


class EmulatedKernels:
    """What ``platonic_core._C.weight_compression`` has for CUDA devices, on the CPU."""

    def __init__(self, library: ctypes.CDLL):
        i, n, d, p = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
        self._library, self.at_end = library, True
        library.emulated_error.restype = ctypes.c_char_p
        library.emulated_allocate.restype, library.emulated_allocate.argtypes = p, [n, i]
        library.emulated_release.argtypes = [p, n, i]
        library.compress_scratch_bytes.restype, library.compress_scratch_bytes.argtypes = n, [i, n, n, i, n, n]
        library.decompress_scratch_bytes.restype, library.decompress_scratch_bytes.argtypes = n, [i, n, n]
        library.compress_on_device.argtypes = [i, n, n, p, i, p, i, n, n, i, i, d, i, d, i, p, p, p]
        library.decompress_on_device.argtypes = [p, n, i, n, n, p, i, p, i, d, i, p, p]

    def __getattr__(self, name: str):
        return getattr(_C.weight_compression, name)

    def run_backwards(self, backwards: bool) -> None:
        """Threads and blocks from the last to the first."""
        self._library.emulated_backwards(backwards)

    @contextmanager
    def _guarded(self, address: int, size: int, *, read: bool, write: bool) -> Iterator[int]:
        memory = self._library.emulated_allocate(size, self.at_end)
        try:
            ctypes.memset(memory, 0xA5, size)
            if read:
                ctypes.memmove(memory, address, size)
            yield memory
            if write:
                ctypes.memmove(address, memory, size)
        finally:
            self._library.emulated_release(memory, size, self.at_end)

    def _run(self, call, *arguments) -> None:
        if call(*arguments):
            raise RuntimeError(self._library.emulated_error().decode())

    def compress_scratch_bytes(self, dtype: int, item: int, n: int, way: int, group_size: int, cut: int) -> int:
        return self._library.compress_scratch_bytes(dtype, item, n, way, group_size, cut)

    def decompress_scratch_bytes(self, dtype: int, item: int, n: int) -> int:
        return self._library.decompress_scratch_bytes(dtype, item, n)

    def compress_on_device(self, dtype, item, n, x, sizes, way, group_size, cut, keep, rule, value, bits, fraction,
                           sampled, out, size, scratch, device, threads, stream):  # fmt: skip
        room = compress_bound(n, DTYPES[dtype], len(sizes))
        shape = (ctypes.c_int64 * len(sizes))(*sizes)
        with ExitStack() as stack:
            x = stack.enter_context(self._guarded(x, n * item, read=True, write=False))
            out = stack.enter_context(self._guarded(out, room, read=True, write=True))
            size = stack.enter_context(self._guarded(size, 8, read=False, write=True))
            scratch_bytes = self.compress_scratch_bytes(dtype, item, n, way, group_size, cut)
            scratch = stack.enter_context(self._guarded(scratch, scratch_bytes, read=False, write=False))
            self._run(self._library.compress_on_device, dtype, item, n, x, len(sizes), shape, way, group_size, cut, keep,
                      rule, value, bits, fraction, sampled, out, size, scratch)  # fmt: skip

    def decompress_on_device(self, payload, size, dtype, item, n, out, sizes, accumulate, scale, check, status,
                             scratch, device, threads, stream):  # fmt: skip
        shape = (ctypes.c_int64 * len(sizes))(*sizes)
        with ExitStack() as stack:
            payload = stack.enter_context(self._guarded(payload, size, read=True, write=False))
            out = stack.enter_context(self._guarded(out, n * item, read=True, write=True))
            status = stack.enter_context(self._guarded(status, 4, read=False, write=True))
            scratch_bytes = self.decompress_scratch_bytes(dtype, item, n)
            scratch = stack.enter_context(self._guarded(scratch, scratch_bytes, read=False, write=False))
            self._run(self._library.decompress_on_device, payload, size, dtype, item, n, out, len(sizes), shape,
                      accumulate, scale, check, status, scratch)  # fmt: skip


def faults_found(library: ctypes.CDLL) -> list[str]:
    """What the emulation says of each kernel of faults.cpp, and of the last, which has none."""
    library.run_faulty.restype, library.run_faulty.argtypes = ctypes.c_char_p, [ctypes.c_int, ctypes.c_void_p]
    library.emulated_allocate.restype, library.emulated_allocate.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_int64, ctypes.c_int],
    )
    out, found = library.emulated_allocate(4 * 64, True), []
    for which in range(6):
        message = library.run_faulty(which, out).decode()
        found.append(
            message or str(torch.frombuffer(bytearray(ctypes.string_at(out, 256)), dtype=torch.int32).tolist())
        )
    return found
