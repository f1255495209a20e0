// Many small ridge systems at once: (G_b + l2 I) W_b = C_b for b in [0, batch), every l2 of a grid, by Cholesky.
//
// Letters: B systems, p unknowns, r right-hand sides, m rows of data, L values of l2. Arrays are contiguous, the last
// index runs fastest, and they lie on the device of Launch. Any of B, r, L, m may be 0 (nothing is written for an
// empty output); 1 <= p <= max_ridge_width.
//
// The factor is found pivot by pivot. Pivot i (counted from 1) is refused when it is not finite or not above
// tolerance * (G_ii + l2): then nothing but rounding error is left of it. A refused system gets that i as its status
// (the first one) and NaN weights; a solved one gets 0. No system touches another.
//
// gram systems: everything is computed in T.
//   gram    [B, p, p] symmetric; only the lower triangle takes part
//   right   [B, p, r]
// data systems: G_b = X_b' X_b and C_b = X_b' Y_b, whatever T is in double (the products of two floats are exact
// there), as are factor and solution; the weights are rounded to T at the end. With intercepts != nullptr an
// unpenalised constant is fitted as well.
//   x       [B, m, p]
//   y       [B, m, r]
//   intercepts [B, L, r]
// both:
//   l2      [L] double
//   weights [B, L, p, r]
//   status  [B, L]
//
// Scratch: the CPU driver allocates it; the CUDA kernels use shared memory alone.
#pragma once

#include <cstdint>

#include "common/launch.h"

namespace platonic {

constexpr int64_t max_ridge_width = 128;

template <class T>
struct GramSystems {
    const T* gram;
    const T* right;
    const double* l2;
    T* weights;
    int32_t* status;
    int64_t batch, p, r, grid;
    double tolerance;
};

template <class T>
struct DataSystems {
    const T* x;
    const T* y;
    const double* l2;
    T* weights;
    T* intercepts;
    int32_t* status;
    int64_t batch, m, p, r, grid;
    double tolerance;
};

namespace cpu {
void batched_ridge(const GramSystems<float>& systems, const Launch& on);
void batched_ridge(const GramSystems<double>& systems, const Launch& on);
void batched_ridge(const DataSystems<float>& systems, const Launch& on);
void batched_ridge(const DataSystems<double>& systems, const Launch& on);
}  // namespace cpu

namespace cuda {
void batched_ridge(const GramSystems<float>& systems, const Launch& on);
void batched_ridge(const GramSystems<double>& systems, const Launch& on);
void batched_ridge(const DataSystems<float>& systems, const Launch& on);
void batched_ridge(const DataSystems<double>& systems, const Launch& on);
}  // namespace cuda

}  // namespace platonic
