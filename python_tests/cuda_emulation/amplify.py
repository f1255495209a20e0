"""The CUDA functions of gradamp on the CPU."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from math import prod

from cuda_emulation.library import Emulated
from platonic_core import _C

ITEMS = (2, 2, 4, 8)  # bytes of an element of each type


def arithmetic_bytes(type_: int) -> int:
    return 8 if type_ == 3 else 4


class EmulatedAmplify(Emulated):
    """What ``platonic_core._C.gradamp`` has for CUDA devices, on the CPU."""

    def __init__(self, library: ctypes.CDLL):
        i, n, p = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
        super().__init__(library, _C.gradamp)
        library.amplify.argtypes = [i, i, p, p, p, p, p, p, n, n, n, p, p, p, i, i, p, p]
        library.sum_denominator.argtypes = [p, n, n, n, p, i, p, p]
        library.scale_gradient.argtypes = [i, p, p, p, i]

    def _scratch(self, stack: ExitStack) -> int | None:
        # The CPU's callers have none; its address is not read.
        return self.guard(stack, 1, 8 * self.amplify_partials, read=False)

    def amplify(self, amplifier, type_, shape, x, grad, target, dense, weight, ignore_index, class_offset, all_classes,
                settings, streams, denominator, factor, per_sample, accumulate, losses, scratch, *on):  # fmt: skip
        size, wide = prod(shape), arithmetic_bytes(type_)
        samples = shape[0] * shape[2]
        with ExitStack() as stack:
            x_there = self.guard(stack, x, size * ITEMS[type_], write=grad == x)
            grad = x_there if grad == x else self.guard(stack, grad, size * ITEMS[type_], read=False, write=True)
            self.call(
                self.library.amplify, amplifier, type_, (ctypes.c_int64 * 3)(*shape), x_there, grad,
                self.guard(stack, target, 8 * samples), self.guard(stack, dense, wide * size),
                self.guard(stack, weight, wide * all_classes), ignore_index, class_offset, all_classes,
                (ctypes.c_double * 5)(*settings), self.guard(stack, denominator, 8), self.guard(stack, factor, wide),
                per_sample, accumulate,
                self.guard(stack, losses, 8 * (samples if per_sample else 1), read=accumulate, write=True),
                self._scratch(stack),
            )  # fmt: skip

    def sum_denominator(self, target, count, ignore_index, classes, weight, is_double, denominator, scratch, *on):
        with ExitStack() as stack:
            self.call(
                self.library.sum_denominator, self.guard(stack, target, 8 * count), count, ignore_index, classes,
                self.guard(stack, weight, (8 if is_double else 4) * classes), is_double,
                self.guard(stack, denominator, 8, read=False, write=True), self._scratch(stack),
            )  # fmt: skip

    def scale_gradient(self, type_, shape, grad, factor, per_sample, *on):
        with ExitStack() as stack:
            factors = shape[0] * shape[2] if per_sample else 1
            self.call(
                self.library.scale_gradient, type_, (ctypes.c_int64 * 3)(*shape),
                self.guard(stack, grad, prod(shape) * ITEMS[type_], write=True),
                self.guard(stack, factor, factors * arithmetic_bytes(type_)), per_sample,
            )  # fmt: skip
