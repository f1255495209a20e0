"""The CUDA functions of platonic on the CPU."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from itertools import pairwise

from cuda_emulation.library import Emulated
from platonic_core import _C


class EmulatedPlatonic(Emulated):
    """What ``platonic_core._C.platonic`` has for CUDA devices, on the CPU. Callers with tensors of the CPU bring no scratch."""

    def __init__(self, library: ctypes.CDLL):
        i, n, d = ctypes.c_int, ctypes.c_int64, ctypes.c_double
        p, array = ctypes.c_void_p, ctypes.c_void_p
        super().__init__(library, _C.platonic)
        library.emulated_gram.argtypes = [i, array, array, i]
        library.emulated_centred_product.argtypes = [i, array, array, n]
        library.emulated_project_rows.argtypes = [i, array, array]
        library.emulated_batched_ridge.argtypes = [i, i, array, array, d]
        library.emulated_rolling_ridge.argtypes = [i, array, array, d, d]
        library.emulated_narrow_scratch.argtypes = [n, n, n, n]
        library.emulated_narrow_scratch.restype = n
        library.emulated_fit_narrow.argtypes = [n, n, n, n, n, array, i, array, i, i, array, p]

    def _buffers(
        self, stack: ExitStack, inputs: list[tuple[int, int]], outputs: list[tuple[int, int]], scratch: int = 0
    ):
        """Addresses for a kernel, of (address, bytes) each; `scratch` bytes, if any, come last."""
        there = [self.guard(stack, *buffer) for buffer in inputs]
        there += [self.guard(stack, *buffer, read=False, write=True) for buffer in outputs]
        if scratch:
            there.append(self.guard(stack, 1, scratch, read=False))  # the address is not read
        return (ctypes.c_void_p * len(there))(*there)

    def gram(self, is_double, rows, columns, stride, x, x_mean, x_factor, weight, bias, activation, width, y, targets,
             row_weight, z, gram, mean, total, scratch, *on):  # fmt: skip
        e, p = 8 if is_double else 4, width + targets
        with ExitStack() as stack:
            inputs = [(x, e * strided(rows, columns, stride)), (x_mean, e * columns), (x_factor, e * columns)]
            inputs += [
                (weight, e * columns * width),
                (bias, e * width),
                (y, e * rows * targets),
                (row_weight, e * rows),
            ]
            outputs = [(z, e * rows * width), (gram, 8 * p * p), (mean, 8 * p), (total, 8)]
            buffers = self._buffers(stack, inputs, outputs, self.gram_scratch_bytes(rows, p))
            shape = integers(rows, columns, stride, width, targets)
            self.call(self.library.emulated_gram, is_double, shape, buffers, activation)

    def centred_product(self, is_double, rows, columns, stride, x, y, targets, row_weight, shift, vectors, count, dots,
                        product, sums, scratch, *on):  # fmt: skip
        e, p = 8 if is_double else 4, columns + targets
        with ExitStack() as stack:
            inputs = [(x, e * strided(rows, columns, stride)), (y, e * rows * targets), (row_weight, e * rows)]
            inputs += [(shift, e * p), (vectors, e * count * p)]
            outputs = [(dots, e * rows * count), (product, 8 * count * p), (sums, 8 * p)]
            buffers = self._buffers(stack, inputs, outputs, 8 * self.product_slices(rows) * (count + 1) * p)
            shape = integers(rows, columns, stride, targets)
            self.call(self.library.emulated_centred_product, is_double, shape, buffers, count)

    def project_rows(self, is_double, rows, columns, stride, x, y, targets, shift, direction, out, *on):
        e, p = 8 if is_double else 4, columns + targets
        with ExitStack() as stack:
            inputs = [
                (x, e * strided(rows, columns, stride)),
                (y, e * rows * targets),
                (shift, 8 * p),
                (direction, 8 * p),
            ]
            buffers = self._buffers(stack, inputs, [(out, 8 * rows)])
            shape = integers(rows, columns, stride, targets)
            self.call(self.library.emulated_project_rows, is_double, shape, buffers)

    def _ridge_of_gram(self, e, gram, right, l2, weights, status, batch, p, r, grid, tolerance, *on):
        with ExitStack() as stack:
            inputs = [(gram, e * batch * p * p), (right, e * batch * p * r), (l2, 8 * grid)]
            buffers = self._buffers(stack, inputs, [(weights, e * batch * grid * p * r), (status, 4 * batch * grid)])
            sizes = integers(batch, p, r, grid)
            self.call(self.library.emulated_batched_ridge, e == 8, False, buffers, sizes, tolerance)

    def batched_ridge_gram_float32(self, *arguments):
        self._ridge_of_gram(4, *arguments)

    def batched_ridge_gram_float64(self, *arguments):
        self._ridge_of_gram(8, *arguments)

    def _ridge_of_data(self, e, x, y, l2, weights, intercepts, status, batch, m, p, r, grid, tolerance, *on):
        systems = batch * grid
        with ExitStack() as stack:
            inputs = [(x, e * batch * m * p), (y, e * batch * m * r), (l2, 8 * grid)]
            outputs = [(weights, e * systems * p * r), (intercepts, e * systems * r), (status, 4 * systems)]
            buffers, sizes = self._buffers(stack, inputs, outputs), integers(batch, m, p, r, grid)
            self.call(self.library.emulated_batched_ridge, e == 8, True, buffers, sizes, tolerance)

    def batched_ridge_data_float32(self, *arguments):
        self._ridge_of_data(4, *arguments)

    def batched_ridge_data_float64(self, *arguments):
        self._ridge_of_data(8, *arguments)

    def _roll(self, e, x, y, weights, intercepts, status, n, p, r, window, min_periods, segment, l2, tolerance, *on):
        with ExitStack() as stack:
            outputs = [(weights, e * n * p * r), (intercepts, e * n * r), (status, 4 * n)]
            buffers = self._buffers(stack, [(x, e * n * p), (y, e * n * r)], outputs)
            sizes = integers(n, p, r, window, min_periods, segment)
            self.call(self.library.emulated_rolling_ridge, e == 8, buffers, sizes, l2, tolerance)

    def rolling_ridge_float32(self, *arguments):
        self._roll(4, *arguments)

    def rolling_ridge_float64(self, *arguments):
        self._roll(8, *arguments)

    def fit_narrow(
        self, m, k, n_tries, width_max, widths, activation, rule, relative, weighted, addresses, scratch, *on
    ):
        panel, layers = self.narrow_panel, len(widths) - 1
        panels = -(-m // panel)
        draws = sum(n_tries * (1 + a + k) * b for a, b in pairwise(widths))
        sizes = [panels * width_max * panel, width_max, panels * (k + 1) * panel, k + 2, draws]
        sizes += [sum(a * b for a, b in pairwise(widths)), sum(widths[1:]), layers + 1, layers + 1, layers]
        sizes += [(widths[-1] + 1) * k, 1]
        with ExitStack() as stack:
            there = [
                self.guard(stack, address, 8 * size, read=i < 5, write=i < 2 or i >= 5)
                for i, (address, size) in enumerate(zip(addresses, sizes, strict=True))
            ]
            wanted = 8 * self.library.emulated_narrow_scratch(m, k, width_max, n_tries)
            self.call(
                self.library.emulated_fit_narrow, m, k, layers, n_tries, width_max, integers(*widths), activation,
                (ctypes.c_double * 5)(*rule), relative, weighted, (ctypes.c_void_p * 12)(*there),
                self.guard(stack, 1, wanted, read=False),
            )  # fmt: skip


def integers(*values: int) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def strided(rows: int, columns: int, stride: int) -> int:
    """Elements from the first to the last."""
    return (rows - 1) * stride + columns if rows and columns else 0
