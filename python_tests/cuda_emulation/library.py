"""Builds CUDA sources for the CPU, and what the rooms' stand-ins for their bindings share.

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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = sorted(CSRC.glob("*/*.cu"))
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
    sources = [*KERNELS, *sorted(HERE.glob("*.cpp"))]
    target = folder / "emulated.so"
    objects = [folder / f"{source.name}.o" for source in sources]
    compiler, includes = _compiler(), [f"-I{HERE}", f"-I{CSRC}"]
    jobs = [
        subprocess.Popen([*compiler, *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(made)])
        for source, made in zip(sources, objects, strict=True)
    ]
    if max(job.wait() for job in jobs) > 0:
        raise RuntimeError("the CUDA sources do not compile for the CPU; the compiler's messages are above")
    link = ["-shared", "-pthread", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(target)]
    subprocess.run([*compiler, *link], check=True)
    library = ctypes.CDLL(str(target))
    library.emulated_error.restype = ctypes.c_char_p
    library.emulated_allocate.restype = ctypes.c_void_p
    library.emulated_allocate.argtypes = [ctypes.c_int64, ctypes.c_int]
    library.emulated_release.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return library


class Emulated:
    """What stands in for a submodule of ``platonic_core._C``: its CUDA functions on the CPU, all others its own."""

    def __init__(self, library: ctypes.CDLL, native: Any):
        self.library, self.native, self.at_end, self.calls = library, native, True, 0
        library.emulated_backwards(False)

    def __getattr__(self, name: str):
        return getattr(self.native, name)

    def run_backwards(self, backwards: bool) -> None:
        """Threads and blocks from the last to the first."""
        self.library.emulated_backwards(backwards)

    def guard(self, stack: ExitStack, address: int, size: int, *, read: bool = True, write: bool = False) -> int | None:
        """Memory that stands in for `size` bytes at `address` until the stack is left; None for address 0."""
        if address == 0:
            return None
        memory = self.library.emulated_allocate(size, self.at_end)
        stack.callback(self.library.emulated_release, memory, size, self.at_end)
        ctypes.memset(memory, 0xA5, size)
        if read:
            ctypes.memmove(memory, address, size)
        if write:
            stack.callback(ctypes.memmove, address, memory, size)
        return memory

    def call(self, function: Any, *arguments: Any) -> None:
        self.calls += 1
        if function(*arguments):
            raise RuntimeError(self.library.emulated_error().decode())


def faults_found(library: ctypes.CDLL) -> list[str]:
    """What the emulation says of each kernel of faults.cpp, and what the last, which has none, computes."""
    library.emulated_backwards(False)
    out, found = library.emulated_allocate(4 * 64, True), []
    library.run_faulty.argtypes = [ctypes.c_int, ctypes.c_void_p]
    for which in range(7):
        if library.run_faulty(which, out):
            found.append(library.emulated_error().decode())
        else:
            found.append(str(torch.frombuffer(bytearray(ctypes.string_at(out, 256)), dtype=torch.int32).tolist()))
    return found
