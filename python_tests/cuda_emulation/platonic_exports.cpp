// The CUDA entry points of csrc/platonic for ctypes, with the parameters of its bindings.cpp.
#include "exports.h"
#include "platonic/batched_ridge.h"
#include "platonic/fit_narrow.h"
#include "platonic/gram.h"
#include "platonic/rolling_ridge.h"
#include "platonic/sorted_pca.h"

using namespace platonic;

namespace {

constexpr Launch device{0, 0, nullptr};

template <class T>
T* typed(void* pointer) {
    return static_cast<T*>(pointer);
}

template <class T>
void solve_gram(void* const* p, const int64_t* sizes, double tolerance) {
    cuda::batched_ridge(GramSystems<T>{typed<T>(p[0]), typed<T>(p[1]), typed<double>(p[2]), typed<T>(p[3]),
                                       typed<int32_t>(p[4]), sizes[0], sizes[1], sizes[2], sizes[3], tolerance},
                        device);
}

template <class T>
void solve_data(void* const* p, const int64_t* sizes, double tolerance) {
    cuda::batched_ridge(
        DataSystems<T>{typed<T>(p[0]), typed<T>(p[1]), typed<double>(p[2]), typed<T>(p[3]), typed<T>(p[4]),
                       typed<int32_t>(p[5]), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], tolerance},
        device);
}

template <class T>
void roll(void* const* p, const int64_t* sizes, double l2, double tolerance) {
    cuda::rolling_ridge(
        RollingRidge<T>{typed<T>(p[0]), typed<T>(p[1]), typed<T>(p[2]), typed<T>(p[3]), typed<int32_t>(p[4]), sizes[0],
                        sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], l2, tolerance},
        device);
}

}  // namespace

extern "C" {

int emulated_gram(int is_double, const int64_t* shape, void* const* p, int activation) {
    return emulation::guarded([&] {
        cuda::gram({is_double != 0, shape[0], shape[1], shape[2], p[0], p[1], p[2], p[3], p[4], activation, shape[3],
                    p[5], shape[4], p[6], p[7], typed<double>(p[8]), typed<double>(p[9]), typed<double>(p[10]), p[11]},
                   device);
    });
}

int emulated_centred_product(int is_double, const int64_t* shape, void* const* p, int64_t count) {
    return emulation::guarded([&] {
        cuda::centred_product({{is_double != 0, shape[0], shape[1], shape[2], p[0], p[1], shape[3]},
                               p[2],
                               p[3],
                               p[4],
                               count,
                               p[5],
                               typed<double>(p[6]),
                               typed<double>(p[7]),
                               typed<double>(p[8])},
                              device);
    });
}

int emulated_project_rows(int is_double, const int64_t* shape, void* const* p) {
    return emulation::guarded([&] {
        cuda::project_rows({{is_double != 0, shape[0], shape[1], shape[2], p[0], p[1], shape[3]},
                            typed<double>(p[2]),
                            typed<double>(p[3]),
                            typed<double>(p[4])},
                           device);
    });
}

int emulated_batched_ridge(int is_double, int data, void* const* p, const int64_t* sizes, double tolerance) {
    const auto solve = data        ? is_double ? solve_data<double> : solve_data<float>
                       : is_double ? solve_gram<double>
                                   : solve_gram<float>;
    return emulation::guarded([&] { solve(p, sizes, tolerance); });
}

int emulated_rolling_ridge(int is_double, void* const* p, const int64_t* sizes, double l2, double tolerance) {
    return emulation::guarded([&] { (is_double ? roll<double> : roll<float>)(p, sizes, l2, tolerance); });
}

int64_t emulated_narrow_scratch(int64_t m, int64_t k, int64_t width_max, int64_t n_tries) {
    return cuda::narrow_scratch_size(m, k, width_max, n_tries);
}

int emulated_fit_narrow(int64_t m, int64_t k, int64_t layers, int64_t n_tries, int64_t width_max, const int64_t* widths,
                        int activation, const double* rule, int relative, int weighted, void* const* p,
                        double* scratch) {
    return emulation::guarded([&] {
        cuda::fit_narrow({m,
                          k,
                          layers,
                          n_tries,
                          width_max,
                          widths,
                          static_cast<Activation>(activation),
                          {rule[0], rule[1], rule[2], rule[3], rule[4], relative != 0},
                          weighted != 0,
                          typed<double>(p[0]),
                          typed<double>(p[1]),
                          typed<double>(p[2]),
                          typed<double>(p[3]),
                          typed<double>(p[4]),
                          typed<double>(p[5]),
                          typed<double>(p[6]),
                          typed<double>(p[7]),
                          typed<double>(p[8]),
                          typed<int64_t>(p[9]),
                          typed<double>(p[10]),
                          typed<int64_t>(p[11]),
                          scratch},
                         device);
    });
}

}  // extern "C"
