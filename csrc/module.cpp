// The extension module platonic_core._C: one submodule per room, and what the build chose.
#include <pybind11/pybind11.h>

#include <string>

#include "common/cpu.h"
#include "common/launch.h"

namespace py = pybind11;

namespace platonic {
void bind_platonic(py::module_& m);
void bind_weight_compression(py::module_& m);
void bind_gradamp(py::module_& m);
}  // namespace platonic

#define PLATONIC_STRINGIFY_(...) #__VA_ARGS__
#define PLATONIC_STRINGIFY(...) PLATONIC_STRINGIFY_(__VA_ARGS__)

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of Platonic. Use them through the Python packages, which check their arguments.";
    m.attr("version") = PLATONIC_STRINGIFY(PLATONIC_VERSION);
    m.attr("has_cuda") = platonic::has_cuda();
    m.attr("cuda_version") = PLATONIC_STRINGIFY(PLATONIC_CUDA_VERSION);
    m.attr("cuda_archs") = PLATONIC_STRINGIFY(PLATONIC_CUDA_ARCHS);
    m.attr("compiler") = std::string("C++ ") + std::to_string(__cplusplus) + ", " + __VERSION__;
    m.def(
        "isa", [] { return platonic::isa_name(platonic::isa()); },
        "The instruction set that CPU kernels use: scalar, avx2 or avx512.");
    m.def(
        "limit_isa", [](const std::string& name) { platonic::limit_isa(name.c_str()); }, py::arg("name"),
        "Use at most this instruction set; '' lifts the limit. For tests and benchmarks.");

    py::module_ room = m.def_submodule("platonic", "Closed-form fitting of multilayer perceptrons.");
    platonic::bind_platonic(room);
    py::module_ codec = m.def_submodule("weight_compression", "Entropy-coded quantised weights.");
    platonic::bind_weight_compression(codec);
    py::module_ losses = m.def_submodule("gradamp", "Gradient-amplification losses.");
    platonic::bind_gradamp(losses);
}
