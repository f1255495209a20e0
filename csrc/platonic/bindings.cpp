// Python's way into the kernels of this room. Pointers arrive as integers from platonic/_ops.py, the only caller,
// which has checked dtypes, shapes, devices and layouts; nothing is checked again here. The GIL is released.
#include "common/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "common/activation.h"
#include "common/math_probe.h"
#include "platonic/batched_ridge.h"
#include "platonic/fit_narrow.h"
#include "platonic/gram.h"
#include "platonic/rolling_ridge.h"
#include "platonic/sorted_pca.h"

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
            const MathProbe probe{static_cast<MathFunction>(function),
                                  activation,
                                  is_double,
                                  pointer<const void>(x),
                                  pointer<void>(y),
                                  n};
            PLATONIC_DISPATCH(probe_math(probe));
        },
        "y = function of x for tests: 0 exp, 1 expm1, 2 tanh, 3 vector activation, 4 scalar activation.");
}

// ---- fit_narrow ----

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
        [](int64_t m, int64_t k, int64_t n_tries, int64_t width_max, const std::vector<int64_t>& widths, int activation,
           std::array<double, 5> rule, bool relative, bool weighted, std::array<uintptr_t, 12> p, uintptr_t scratch,
           int device, int threads, uintptr_t stream) {
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
            PLATONIC_ON_DEVICE(fit_narrow, args, on);
        },
        "Fits layers; the arguments are those of FitNarrow in fit_narrow.h, in its order.");
}

// ---- gram ----

void bind_gram(py::module_& m) {
    m.def("gram_scratch_bytes", &gram_scratch_bytes, "Bytes of device scratch for (rows, p).");
    m.def(
        "gram",
        [](bool is_double, int64_t rows, int64_t columns, int64_t row_stride, uintptr_t x, uintptr_t x_mean,
           uintptr_t x_factor, uintptr_t weight, uintptr_t bias, int activation, int64_t width, uintptr_t y,
           int64_t targets, uintptr_t row_weight, uintptr_t z, uintptr_t gram, uintptr_t mean, uintptr_t total,
           uintptr_t scratch, int device, int threads, uintptr_t stream) {
            const GramArgs args{is_double,
                                rows,
                                columns,
                                row_stride,
                                pointer<const void>(x),
                                pointer<const void>(x_mean),
                                pointer<const void>(x_factor),
                                pointer<const void>(weight),
                                pointer<const void>(bias),
                                activation,
                                width,
                                pointer<const void>(y),
                                targets,
                                pointer<const void>(row_weight),
                                pointer<void>(z),
                                pointer<double>(gram),
                                pointer<double>(mean),
                                pointer<double>(total),
                                pointer<void>(scratch)};
            py::gil_scoped_release release;
            const Launch on{device, threads, pointer<void>(stream)};
            PLATONIC_ON_DEVICE(gram, args, on);
        },
        "Moments of [z | y]; see gram.h.");
}

// ---- sorted_pca ----

void bind_sorted_pca(py::module_& m) {
    const auto joined = [](bool is_double, int64_t rows, int64_t columns, int64_t row_stride, uintptr_t x, uintptr_t y,
                           int64_t targets) {
        return JoinedRows{is_double, rows, columns, row_stride, pointer<const void>(x), pointer<const void>(y),
                          targets};
    };
    m.attr("max_product_vectors") = max_product_vectors;
    m.def("product_slices", &product_slices, "Slices of rows that the CUDA kernel of centred_product cuts.");
    m.def(
        "centred_product",
        [joined](bool is_double, int64_t rows, int64_t columns, int64_t row_stride, uintptr_t x, uintptr_t y,
                 int64_t targets, uintptr_t row_weight, uintptr_t shift, uintptr_t vectors, int64_t count,
                 uintptr_t dots, uintptr_t product, uintptr_t sums, uintptr_t scratch, int device, int threads,
                 uintptr_t stream) {
            const CentredProductArgs args{joined(is_double, rows, columns, row_stride, x, y, targets),
                                          pointer<const void>(row_weight),
                                          pointer<const void>(shift),
                                          pointer<const void>(vectors),
                                          count,
                                          pointer<void>(dots),
                                          pointer<double>(product),
                                          pointer<double>(sums),
                                          pointer<double>(scratch)};
            py::gil_scoped_release release;
            const Launch on{device, threads, pointer<void>(stream)};
            PLATONIC_ON_DEVICE(centred_product, args, on);
        },
        "Products with the second moments of [x | y] about a shift; see sorted_pca.h.");
    m.def(
        "project_rows",
        [joined](bool is_double, int64_t rows, int64_t columns, int64_t row_stride, uintptr_t x, uintptr_t y,
                 int64_t targets, uintptr_t shift, uintptr_t direction, uintptr_t out, int device, int threads,
                 uintptr_t stream) {
            const ProjectRowsArgs args{joined(is_double, rows, columns, row_stride, x, y, targets),
                                       pointer<const double>(shift), pointer<const double>(direction),
                                       pointer<double>(out)};
            py::gil_scoped_release release;
            const Launch on{device, threads, pointer<void>(stream)};
            PLATONIC_ON_DEVICE(project_rows, args, on);
        },
        "Rows of [x | y] on one direction; see sorted_pca.h.");
}

// ---- batched_ridge ----

template <class Systems>
void run_batched_ridge(const Systems& systems, const Launch& on) {
    const py::gil_scoped_release release;
    PLATONIC_ON_DEVICE(batched_ridge, systems, on);
}

template <class T>
void batched_ridge_gram(uintptr_t gram, uintptr_t right, uintptr_t l2, uintptr_t weights, uintptr_t status,
                        int64_t batch, int64_t p, int64_t r, int64_t grid, double tolerance, int device, int threads,
                        uintptr_t stream) {
    run_batched_ridge(GramSystems<T>{pointer<T>(gram), pointer<T>(right), pointer<double>(l2), pointer<T>(weights),
                                     pointer<int32_t>(status), batch, p, r, grid, tolerance},
                      Launch{device, threads, pointer<void>(stream)});
}

template <class T>
void batched_ridge_data(uintptr_t x, uintptr_t y, uintptr_t l2, uintptr_t weights, uintptr_t intercepts,
                        uintptr_t status, int64_t batch, int64_t m, int64_t p, int64_t r, int64_t grid,
                        double tolerance, int device, int threads, uintptr_t stream) {
    run_batched_ridge(DataSystems<T>{pointer<T>(x), pointer<T>(y), pointer<double>(l2), pointer<T>(weights),
                                     pointer<T>(intercepts), pointer<int32_t>(status), batch, m, p, r, grid, tolerance},
                      Launch{device, threads, pointer<void>(stream)});
}

void bind_batched_ridge(py::module_& m) {
    m.def("batched_ridge_gram_float32", &batched_ridge_gram<float>);
    m.def("batched_ridge_gram_float64", &batched_ridge_gram<double>);
    m.def("batched_ridge_data_float32", &batched_ridge_data<float>);
    m.def("batched_ridge_data_float64", &batched_ridge_data<double>);
}

// ---- rolling_ridge ----

template <class T>
void rolling_ridge(uintptr_t x, uintptr_t y, uintptr_t weights, uintptr_t intercepts, uintptr_t status, int64_t n,
                   int64_t p, int64_t r, int64_t window, int64_t min_periods, int64_t segment, double l2,
                   double tolerance, int device, int threads, uintptr_t stream) {
    const RollingRidge<T> task{pointer<T>(x),
                               pointer<T>(y),
                               pointer<T>(weights),
                               pointer<T>(intercepts),
                               pointer<int32_t>(status),
                               n,
                               p,
                               r,
                               window,
                               min_periods,
                               segment,
                               l2,
                               tolerance};
    const Launch on{device, threads, pointer<void>(stream)};
    const py::gil_scoped_release release;
    if (device < 0) return cpu::rolling_ridge(task, on);
#if defined(PLATONIC_CUDA)
    cuda::rolling_ridge(task, on);
#else
    no_cuda("rolling_ridge");
#endif
}

void bind_rolling_ridge(py::module_& m) {
    m.def("rolling_segment", &rolling_segment, py::arg("n"), py::arg("window"), py::arg("lanes"));
    m.def("rolling_ridge_float32", &rolling_ridge<float>);
    m.def("rolling_ridge_float64", &rolling_ridge<double>);
}

}  // namespace

void bind_platonic(py::module_& m) {
    bind_math(m);
    bind_fit_narrow(m);
    bind_gram(m);
    bind_sorted_pca(m);
    bind_batched_ridge(m);
    bind_rolling_ridge(m);
}

}  // namespace platonic
