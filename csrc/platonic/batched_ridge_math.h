// What the CUDA kernels of batched_ridge and rolling_ridge compute besides sums: where entries lie, which pivots are
// refused, and the rank-one changes of a factor.
#pragma once

#include <cstdint>

#include "common/launch.h"

namespace platonic {
namespace device {

// Entry (i, j), i >= j, of a triangle stored by columns of `rows` - j values is at column_start(j, rows) + i - j.
PLATONIC_HD int column_start(int j, int rows) { return j * rows - j * (j - 1) / 2; }

// `diagonal` is the pivot's entry of G + l2 I.
template <class T>
PLATONIC_HD bool refuse_pivot(T pivot, T diagonal, T tolerance) {
    const T least = diagonal * tolerance;
    return !(pivot > (least > T(0) ? least : T(0)) && pivot - pivot == T(0));
}

// What is reported for pivot `first` (from 1; 0: none) when `constant` leading unknowns are no features.
PLATONIC_HD int32_t refused_feature(int first, int constant) {
    return first > constant + 1 ? first - constant : first != 0;
}

// One column's part in taking a row up and a row down in L D L' (see rolling_ridge_simd.cpp): from the rows' entries p
// and q and the pivot d; alpha and gamma go from column to column.
struct RankOnePair {
    double alpha = 1, gamma = -1;
    double p, q, beta, delta;

    // Returns the new pivot.
    PLATONIC_HD double start_column(double up_entry, double down_entry, double d) {
        p = up_entry;
        q = down_entry;
        const double up = d + alpha * p * p;
        beta = alpha * p / up;
        alpha *= d / up;
        const double down = up + gamma * q * q;
        delta = gamma * q / down;
        gamma *= up / down;
        return down;
    }
    PLATONIC_HD void change(double& entry, double& x, double& z) const {
        x -= p * entry;
        entry += beta * x;
        z -= q * entry;
        entry += delta * z;
    }
};

}  // namespace device
}  // namespace platonic
