// Ridge coefficients of every window of `window` consecutive rows.
//
// Letters: n rows, p features, r targets. Arrays are contiguous, the last index runs fastest, on the device of Launch.
// 1 <= p <= max_ridge_width, r >= 1, window >= 1, min_periods >= 1; n may be 0.
//
//   x          [n, p]
//   y          [n, r]
//   weights    [n, p, r]; row t is of the rows t - window + 1 ... t that exist
//   intercepts [n, r], or nullptr: no constant is fitted. The constant is not penalised.
//   status     [n]: 0; -1: fewer than min_periods usable rows; i > 0: pivot i of the window's Gram matrix + l2 I is not
//              finite or not above tolerance * its diagonal entry (singular to working precision). Weights and
//              intercepts are NaN unless the status is 0.
// A row with a NaN or an infinity in x or y is not usable: the windows that hold it are fitted without it.
//
// Everything is computed in double, whatever T is. The time axis is cut into segments of `segment` rows. A segment
// starts from the Gram matrix of its first window, summed from the data and factored as L D L'; from row to row the
// factor is up-dated with the row that enters, then down-dated with the one that leaves, 2 p^2 multiply-adds each pair.
// The factor is built anew from the data
//   - at the start of every segment: so rounding errors add up over at most `segment` rows;
//   - when the row that leaves has had leverage above 1 - 1/1000: its down-date cancels three digits or more;
//   - when a feature's or target's sum of squares has fallen to 1/10,000 of its largest since the last time: the
//     factor holds rounding errors of that larger size;
//   - when a pivot is not above 1e-10 of its diagonal entry: the window is singular or nearly so, and the new factor
//     decides; so a row of such windows is built anew at every step.
// Which windows are built anew depends on data and segment, never on the number of threads.
//
// Scratch: the CPU driver allocates it; the CUDA kernel uses shared memory alone, one segment a block.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "platonic/batched_ridge.h"

namespace platonic {

template <class T>
struct RollingRidge {
    const T* x;
    const T* y;
    T* weights;
    T* intercepts;
    int32_t* status;
    int64_t n, p, r, window, min_periods, segment;
    double l2, tolerance;
};

// When to build anew, see above.
constexpr double largest_downdate = 1000;
constexpr double smallest_remainder = 1e-4;
constexpr double smallest_kept_pivot = 1e-10;

// Rows of a segment so that `lanes` segments work at a time: long enough that the first window's Gram matrix costs
// about as much as the steps, and not longer than a window (or 256), so that errors do not add up for longer.
inline int64_t rolling_segment(int64_t n, int64_t window, int64_t lanes) {
    const int64_t shortest = window / 4 > 64 ? window / 4 : 64;
    const int64_t longest = window > 256 ? window : 256;
    const int64_t even = (n + lanes - 1) / lanes;
    return even < shortest ? shortest : even > longest ? longest : even;
}

namespace cpu {
void rolling_ridge(const RollingRidge<float>& task, const Launch& on);
void rolling_ridge(const RollingRidge<double>& task, const Launch& on);
}  // namespace cpu

namespace cuda {
void rolling_ridge(const RollingRidge<float>& task, const Launch& on);
void rolling_ridge(const RollingRidge<double>& task, const Launch& on);
}  // namespace cuda

}  // namespace platonic
