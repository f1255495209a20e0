// Python's way into the kernels of this room. Pointers arrive as integers from gradamp/_ops.py, the only caller, which
// has checked dtypes, shapes, devices and layouts; nothing is checked again here. The GIL is released.
#include "common/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "gradamp/amplify.h"

namespace py = pybind11;

namespace platonic {
void bind_gradamp(py::module_& m) {
    m.attr("amplify_partials") = amplify_partials;
    m.def(
        "amplify",
        [](int amplifier, int type, std::array<int64_t, 3> shape, uintptr_t x, uintptr_t grad, uintptr_t target,
           uintptr_t dense, uintptr_t weight, int64_t ignore_index, int64_t class_offset, int64_t all_classes,
           std::array<double, 5> settings, bool streams, uintptr_t denominator, uintptr_t factor, bool per_sample,
           bool accumulate, uintptr_t losses, uintptr_t scratch, int device, int threads, uintptr_t stream) {
            const AmplifyArgs args{static_cast<Amplifier>(amplifier),
                                   static_cast<ElementType>(type),
                                   shape[0],
                                   shape[1],
                                   shape[2],
                                   pointer<const void>(x),
                                   pointer<void>(grad),
                                   pointer<const int64_t>(target),
                                   pointer<const void>(dense),
                                   pointer<const void>(weight),
                                   ignore_index,
                                   class_offset,
                                   all_classes,
                                   settings[0],
                                   settings[1],
                                   settings[2],
                                   settings[3],
                                   settings[4],
                                   streams,
                                   pointer<const double>(denominator),
                                   pointer<const void>(factor),
                                   per_sample,
                                   accumulate,
                                   pointer<double>(losses),
                                   pointer<double>(scratch)};
            const Launch on{device, threads, pointer<void>(stream)};
            const py::gil_scoped_release release;
            PLATONIC_ON_DEVICE(amplify, args, on);
        },
        "Loss and gradient of an amplifier; see amplify.h. settings: alpha, beta, max_input, t_neg, t_pos.");
    m.def(
        "sum_denominator",
        [](uintptr_t target, int64_t count, int64_t ignore_index, int64_t classes, uintptr_t weight, bool is_double,
           uintptr_t denominator, uintptr_t scratch, int device, int threads, uintptr_t stream) {
            const DenominatorArgs args{pointer<const int64_t>(target),
                                       count,
                                       ignore_index,
                                       classes,
                                       pointer<const void>(weight),
                                       is_double,
                                       pointer<double>(denominator),
                                       pointer<double>(scratch)};
            const Launch on{device, threads, pointer<void>(stream)};
            const py::gil_scoped_release release;
            PLATONIC_ON_DEVICE(sum_denominator, args, on);
        },
        "Checks class indices and sums the weights of those that are not ignored; see amplify.h.");
    m.def(
        "scale_gradient",
        [](int type, std::array<int64_t, 3> shape, uintptr_t grad, uintptr_t factor, bool per_sample, int device,
           int threads, uintptr_t stream) {
            const ScaleArgs args{static_cast<ElementType>(type), shape[0],  shape[1], shape[2], pointer<void>(grad),
                                 pointer<const void>(factor),    per_sample};
            const Launch on{device, threads, pointer<void>(stream)};
            const py::gil_scoped_release release;
            PLATONIC_ON_DEVICE(scale_gradient, args, on);
        },
        "A gradient times one factor, or one for every sample, in place; see amplify.h.");
}

}  // namespace platonic
