// Python's way into the kernels of this room. Pointers arrive as integers from platonic/_ops.py, the only caller,
// which has checked dtypes, shapes, devices and layouts; nothing is checked again here. The GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "common/activation.h"
#include "common/launch.h"
#include "common/math_probe.h"
#include "platonic/fit_narrow.h"

namespace py = pybind11;

namespace platonic {
namespace {

// ---- activations and vector math ----

void bind_math(py::module_& m) {
    py::dict activations;
    for (int i = 0; i < activation_count; ++i) activations[activation_names[i]] = i;
    m.attr("activations") = activations;
    m.def(
        "probe_math",
        [](int function, int activation, bool is_double, uintptr_t x, uintptr_t y, int64_t n) {
            const MathProbe probe{
                static_cast<MathFunction>(function), activation, is_double, reinterpret_cast<const void*>(x),
                reinterpret_cast<void*>(y),          n};
            PLATONIC_DISPATCH(probe_math(probe));
        },
        "y = function of x for tests: 0 exp, 1 expm1, 2 tanh, 3 vector activation, 4 scalar activation.");
}

// ---- fit_narrow ----

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_fit_narrow(py::module_& m) {
    m.attr("narrow_panel") = narrow_panel;
    m.attr("narrow_max_width") = narrow_max_width;
    m.def(
        "narrow_scratch_size",
        [](int64_t m, int64_t k, int64_t width_max, int64_t n_tries) -> int64_t {
#if defined(PLATONIC_CUDA)
            return cuda::narrow_scratch_size(m, k, width_max, n_tries);
#else
            (void)m, (void)k, (void)width_max, (void)n_tries;
            no_cuda("fit_narrow");
#endif
        },
        "Doubles of scratch that fit_narrow needs on a CUDA device.");
    m.def(
        "fit_narrow",
        [](int64_t m, int64_t k, int64_t n_tries, int64_t width_max, const std::vector<int64_t>& widths,
           int activation, std::array<double, 5> rule, bool relative, bool weighted, std::array<uintptr_t, 12> p,
           uintptr_t scratch, int device, int threads, uintptr_t stream) {
            const FitNarrow args{m,
                                 k,
                                 static_cast<int64_t>(widths.size()) - 1,
                                 n_tries,
                                 width_max,
                                 widths.data(),
                                 static_cast<Activation>(activation),
                                 {rule[0], rule[1], rule[2], rule[3], rule[4], relative},
                                 weighted,
                                 pointer<double>(p[0]),
                                 pointer<double>(p[1]),
                                 pointer<const double>(p[2]),
                                 pointer<const double>(p[3]),
                                 pointer<const double>(p[4]),
                                 pointer<double>(p[5]),
                                 pointer<double>(p[6]),
                                 pointer<double>(p[7]),
                                 pointer<double>(p[8]),
                                 pointer<int64_t>(p[9]),
                                 pointer<double>(p[10]),
                                 pointer<int64_t>(p[11]),
                                 pointer<double>(scratch)};
            const Launch on{device, threads, pointer<void>(stream)};
            py::gil_scoped_release release;
            if (device < 0) return cpu::fit_narrow(args, on);
#if defined(PLATONIC_CUDA)
            cuda::fit_narrow(args, on);
#else
            no_cuda("fit_narrow");
#endif
        },
        "Fits layers; the arguments are those of FitNarrow in fit_narrow.h, in its order.");
}

}  // namespace

void bind_platonic(py::module_& m) {
    bind_math(m);
    bind_fit_narrow(m);
}

}  // namespace platonic
