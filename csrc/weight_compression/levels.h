// How many levels a tensor gets: round(2^(H + c)) from the entropy H of a coarse histogram of its values.
//
// log2 and exp2 are spelled out in additions, multiplications and divisions of doubles, each rounded on its own
// (this room is compiled without contraction to FMA), so that every device, compiler and library chooses the same
// number of levels. Accuracy: a few units in the last place, far below what rounding to an integer can show.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/launch.h"

namespace platonic {

// log2(x) for finite, normal x > 0: the exponent plus 2 atanh(s) / ln 2 with s = (m - 1) / (m + 1), |s| < 0.172.
PLATONIC_HD double exact_log2(double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    int64_t exponent = static_cast<int64_t>(bits >> 52) - 1023;
    bits = (bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull;
    double m;
    memcpy(&m, &bits, 8);
    if (m > 1.4142135623730951) {
        m = m * 0.5;
        exponent = exponent + 1;
    }
    const double s = (m - 1.0) / (m + 1.0);
    const double z = s * s;
    double sum = 1.0 / 23.0;
    for (int k = 21; k >= 1; k -= 2) sum = sum * z + 1.0 / k;
    return static_cast<double>(exponent) + sum * s * 2.8853900817779268;
}

// 2^x for |x| <= 1000: 2^n times the Taylor series of exp(f ln 2), |f| <= 1/2.
PLATONIC_HD double exact_exp2(double x) {
    int64_t n = static_cast<int64_t>(x);
    if (x - static_cast<double>(n) > 0.5) n = n + 1;
    if (x - static_cast<double>(n) < -0.5) n = n - 1;
    const double f = (x - static_cast<double>(n)) * 0.69314718055994531;
    double sum = 1.0;
    for (int k = 16; k >= 1; --k) sum = 1.0 + sum * f / k;
    const uint64_t bits = static_cast<uint64_t>(n + 1023) << 52;
    double power;
    memcpy(&power, &bits, 8);
    return sum * power;
}

// The part of a sum of c log2 c that a bin of c values has.
PLATONIC_HD double entropy_term(int64_t count) {
    return count > 0 ? static_cast<double>(count) * exact_log2(static_cast<double>(count)) : 0.0;
}

// Shannon entropy in bits of counts that sum to total >= 1, whose terms, added in their order, are `sum`.
PLATONIC_HD double entropy_of_terms(double sum, int64_t total) {
    const double entropy = exact_log2(static_cast<double>(total)) - sum / static_cast<double>(total);
    return entropy > 0.0 ? entropy : 0.0;
}

PLATONIC_HD double histogram_entropy(const int64_t* counts, int64_t bins) {
    int64_t total = 0;
    double sum = 0.0;
    for (int64_t i = 0; i < bins; ++i) {
        total += counts[i];
        sum = sum + entropy_term(counts[i]);
    }
    return entropy_of_terms(sum, total);
}

constexpr int64_t max_levels = 65536;

// round(2^bits), between 2 and max_levels.
PLATONIC_HD int64_t levels_of_bits(double bits) {
    if (!(bits < 16.0)) return max_levels;
    if (bits < 1.0) return 2;
    return static_cast<int64_t>(exact_exp2(bits) + 0.5);
}

// The fewest levels, at least 2, whose bins are at most 2 max_error wide; 0 if max_levels do not suffice.
PLATONIC_HD int64_t levels_of_error(double half_width, double max_error) {
    const double wanted = half_width / max_error;
    if (!(wanted <= static_cast<double>(max_levels))) return 0;
    int64_t levels = static_cast<int64_t>(wanted);
    if (static_cast<double>(levels) < wanted) ++levels;
    return levels < 2 ? 2 : levels;
}

// ---- the sample that H is estimated from ----

constexpr int64_t sample_run = 64;           // consecutive values
constexpr int64_t sample_everything = 4096;  // up to here, all values; beyond, at least so many

// How many runs of sample_run values are taken of n > sample_everything; run r starts at r * (n / runs).
PLATONIC_HD int64_t sample_runs(int64_t n, double fraction) {
    const double wanted = fraction * static_cast<double>(n) / static_cast<double>(sample_run);
    int64_t runs = static_cast<int64_t>(wanted);
    if (static_cast<double>(runs) < wanted) ++runs;
    if (runs < sample_everything / sample_run) runs = sample_everything / sample_run;
    return runs < n / sample_run ? runs : n / sample_run;
}

}  // namespace platonic
