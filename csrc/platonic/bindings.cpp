// Python's way into the kernels of this room. Pointers arrive as integers from platonic/_ops.py, the only caller,
// which has checked dtypes, shapes, devices and layouts; nothing is checked again here. The GIL is released.
#include <pybind11/pybind11.h>

#include "common/activation.h"
#include "common/launch.h"
#include "common/math_probe.h"

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

}  // namespace

void bind_platonic(py::module_& m) { bind_math(m); }

}  // namespace platonic
