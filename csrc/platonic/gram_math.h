// Merging of partial moments, shared by the CPU and CUDA kernels of gram (Chan, Golub and LeVeque 1983).
#pragma once

#include "common/launch.h"

namespace platonic {

// Second moments about the mean from those about a shift: sums[i] = sum w (v_i - shift_i), of total weight w > 0.
PLATONIC_HD double centre_moment(double moment, double sum_i, double sum_j, double weight) {
    return moment - sum_i * (sum_j / weight);
}

// Parts a and b with means that differ by delta and factor = w_a w_b / (w_a + w_b).
PLATONIC_HD double merge_moment(double moment_a, double moment_b, double delta_i, double delta_j, double factor) {
    return moment_a + (moment_b + delta_i * delta_j * factor);
}

PLATONIC_HD double merge_factor(double weight_a, double weight_b) {
    return weight_a * (weight_b / (weight_a + weight_b));
}

PLATONIC_HD double merge_mean(double mean_a, double delta, double weight_a, double weight_b) {
    return mean_a + delta * (weight_b / (weight_a + weight_b));
}

}  // namespace platonic
