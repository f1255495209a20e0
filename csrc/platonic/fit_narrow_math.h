// The small-matrix side of fit_narrow, written once for a CPU thread and for a CUDA block.
//
// A team is whoever executes a function together: OneThread, or the threads of a block laid out nx by ny. Loops over
// rows start at team.y and step by team.ny, loops over columns at team.x by team.nx; team.sync() separates phases.
// Every member calls every function with the same arguments.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "platonic/fit_narrow.h"

namespace platonic {
namespace narrow {

struct OneThread {
    static constexpr int x = 0, nx = 1, y = 0, ny = 1;
    PLATONIC_HD void sync() const {}
};

constexpr double epsilon = 2.220446049250313e-16;
constexpr double tiny = 1e-280;  // squares below have lost digits to underflow

PLATONIC_HD double root(double x) {
#if defined(__CUDACC__)
    return ::sqrt(x);
#else
    return __builtin_sqrt(x);
#endif
}

PLATONIC_HD bool finite(double x) { return x - x == 0.0; }

// What a sweep over the rows leaves for a representation of h columns, row-major [h][h + 1 + k]; with z' = z - shift:
// sum w z'_i z'_j for j >= i (the rest is not read) | sum w z'_i | sum w z'_i (y - ybar).
PLATONIC_HD int64_t sums_size(int64_t h, int64_t k) { return h * (h + 1 + k); }

// What is known of a representation: LSD, jitter, and per column
//   mean, norm |z_j - mean_j|_w (0: the column counts as constant and takes no part),
//   inverse 1 / norm (0 for constant columns), correlation [h][h], coefficients of the read-out [h][k] (raw columns).
struct Stats {
    double *lsd, *jitter, *mean, *norm, *inverse, *correlation, *readout;
};
PLATONIC_HD int64_t stats_size(int64_t h, int64_t k) { return 2 + h * (3 + h + k); }
PLATONIC_HD Stats stats_at(double* base, int64_t h) {
    double* mean = base + 2;
    return {base, base + 1, mean, mean + h, mean + 2 * h, mean + 3 * h, mean + 3 * h + h * h};
}

// A layer that is being tried: its W [h_in][h_out] and b, then b for a shifted input and the shift of its output.
struct Candidate {
    double *weights, *bias, *bias_shifted, *shift;
};
PLATONIC_HD int64_t candidate_size(int64_t h_in, int64_t h_out) { return h_out * (h_in + 3); }
PLATONIC_HD Candidate candidate_at(double* base, int64_t h_in, int64_t h_out) {
    double* bias = base + h_in * h_out;
    return {base, bias, bias + h_out, bias + 2 * h_out};
}

// Row r of the pilot, the evenly spaced rows whose mean becomes the next shift.
PLATONIC_HD int64_t pilot_rows(int64_t m) { return m < narrow_pilot ? m : narrow_pilot; }
PLATONIC_HD int64_t pilot_row(int64_t r, int64_t m) { return (2 * r + 1) * m / (2 * pilot_rows(m)); }

// Doubles of work that solve_readout and form_candidate need.
PLATONIC_HD int64_t solve_work_size(int64_t h, int64_t k) { return h * (h + k) + 2 * h; }
PLATONIC_HD int64_t form_work_size(int64_t h_in, int64_t h_out) { return h_in * h_out + 2 * h_out; }

// mean, norm, inverse and correlation from sums. norm^2 up to (32 epsilon |mean|)^2 sum w is rounding: constant.
template <class Team>
PLATONIC_HD void centre(const Team& team, int h, int k, const double* __restrict__ sums, const double* shift,
                        double weight_sum, const Stats& out, double* offset) {
    const int ld = h + 1 + k;
    for (int i = team.y * team.nx + team.x; i < h; i += team.nx * team.ny) {
        const double mean = sums[i * ld + h] / weight_sum;
        const double square = sums[i * ld + i] - weight_sum * mean * mean;
        const double raw = shift[i] + mean, noise = 32 * epsilon * raw;
        const bool constant = square <= noise * noise * weight_sum + tiny;
        offset[i] = mean;
        out.mean[i] = raw;
        out.norm[i] = constant ? 0.0 : root(square);
        out.inverse[i] = constant ? 0.0 : 1.0 / root(square);
    }
    team.sync();
    for (int i = team.y; i < h; i += team.ny) {
        const double mine = weight_sum * offset[i], scale = out.inverse[i];
        for (int j = i + team.x; j < h; j += team.nx) {
            const double r = (sums[i * ld + j] - mine * offset[j]) * scale * out.inverse[j];
            out.correlation[i * h + j] = out.correlation[j * h + i] = j > i ? r : (scale > 0.0 ? 1.0 : scale);
        }
    }
    team.sync();
}

// One attempt at elimination in the augmented matrix [correlation + diagonal | right sides] of row length h + k, all
// columns scaled to norm 1. Afterwards row c holds D_c L^T and D_c L^-1 (right sides) of the L D L^T factorisation.
// False when a pivot is not above `floor`.
template <class Team>
PLATONIC_HD bool eliminate(const Team& team, int h, int k, const double* __restrict__ sums, const Stats& s,
                           const NarrowRule& rule, double jitter, double floor, double* __restrict__ a) {
    const int ld = h + k;
    for (int i = team.y; i < h; i += team.ny) {
        const double scale = s.inverse[i];
        const double penalty = scale > 0.0 ? (rule.relative ? rule.l2 : rule.l2 * scale * scale) + jitter : 1.0;
        for (int j = i + team.x; j < h; j += team.nx)
            a[i * ld + j] = s.correlation[i * h + j] + (i == j ? penalty : 0.0);
        for (int r = team.x; r < k; r += team.nx) a[i * ld + h + r] = sums[i * (h + 1 + k) + h + 1 + r] * scale;
    }
    team.sync();
    for (int c = 0; c < h; ++c) {
        const double* __restrict__ pivot_row = a + c * ld;
        const double pivot = pivot_row[c];
        if (!(pivot > floor)) {
            team.sync();  // the next attempt overwrites what others may still be reading
            return false;
        }
        const double over = 1.0 / pivot;
        for (int i = c + 1 + team.y; i < h; i += team.ny) {
            const double factor = pivot_row[i] * over;
            double* __restrict__ row = a + i * ld;
            for (int j = i + team.x; j < ld; j += team.nx) row[j] -= factor * pivot_row[j];
        }
        team.sync();
    }
    return true;
}

// Ridge read-out of Y, its LSD, and the jitter it took. With x the solution for columns of norm 1 and Lambda the
// diagonal added to their correlation matrix, |Y - Zx|^2 = |Y|^2 - v'D^-1 v - x'Lambda x (v the eliminated right
// sides): no term is larger than |Y|^2. A pivot D_i is known to some times 4 h epsilon, the floor of those accepted:
// what it explains counts only by the part 1 - 32 h epsilon / D_i, so that rounding seldom makes a try look better than
// it is.
// NaN in *s.lsd says that something was not finite. `a`: solve_work_size doubles.
template <class Team>
PLATONIC_HD void solve_readout(const Team& team, int h, int k, const double* __restrict__ sums, const double* shift,
                               double weight_sum, double y_square, const NarrowRule& rule, const Stats& s,
                               double* __restrict__ a) {
    const int ld = h + k;
    double *offset = a + h * ld, *explained = offset + h;
    centre(team, h, k, sums, shift, weight_sum, s, offset);
    bool sound = true;
    for (int i = 0; i < h; ++i) sound = sound && finite(s.mean[i]) && finite(sums[i * (h + 1 + k) + i]);
    const double floor = 4 * h * epsilon;
    double jitter = 0.0;
    while (sound && !eliminate(team, h, k, sums, s, rule, jitter, jitter > 0.0 ? 0.0 : floor, a)) {
        jitter = jitter > 0.0 ? 10 * jitter : (rule.jitter > floor ? rule.jitter : floor);
        sound = jitter < 100.0 * h;  // more than h makes any correlation matrix diagonally dominant
    }
    if (!sound) {
        if (team.x == 0 && team.y == 0) {
            *s.lsd = root(-1.0);
            *s.jitter = 0.0;
        }
        team.sync();
        return;
    }
    // explained[i] = v_i'v_i / D_i, as far as it is certain; then back substitution by columns, the solution replacing
    // the right sides.
    for (int i = team.y * team.nx + team.x; i < h; i += team.nx * team.ny) {
        double total = 0.0;
        for (int r = 0; r < k; ++r) total += a[i * ld + h + r] * a[i * ld + h + r];
        const double pivot = a[i * ld + i], certain = 1.0 - 8 * floor / pivot;
        explained[i] = certain > 0.0 ? total / pivot * certain : 0.0;
    }
    team.sync();
    for (int c = h - 1; c >= 0; --c) {
        const double over = 1.0 / a[c * ld + c];
        for (int i = team.y; i < c; i += team.ny) {
            const double factor = a[i * ld + c] * over;
            for (int r = team.x; r < k; r += team.nx) a[i * ld + h + r] -= factor * a[c * ld + h + r];
        }
        team.sync();
    }
    for (int i = team.y * team.nx + team.x; i < h; i += team.nx * team.ny) {
        const double over = 1.0 / a[i * ld + i], scale = s.inverse[i];
        const double penalty = scale > 0.0 ? (rule.relative ? rule.l2 : rule.l2 * scale * scale) + jitter : 0.0;
        double square = 0.0;
        for (int r = 0; r < k; ++r) {
            const double x = a[i * ld + h + r] * over;
            square += x * x;
            s.readout[i * k + r] = x * scale;
        }
        explained[i] += penalty * square;
    }
    team.sync();
    if (team.x == 0 && team.y == 0) {
        double left = y_square;
        for (int i = 0; i < h; ++i) left -= explained[i];
        *s.lsd = left < 0.0 ? 0.0 : left / weight_sum;
        *s.jitter = jitter;
    }
    team.sync();
}

// Adds to norms[j] the square of the standard deviation, over the rows, of Zt v_j, for the columns v_j of v [h][n]
// and Zt the standardised representation. `products` [h][n] is work.
template <class Team>
PLATONIC_HD void quadratic_forms(const Team& team, int h, int n, const double* __restrict__ correlation,
                                 const double* __restrict__ v, double* __restrict__ products,
                                 double* __restrict__ norms) {
    for (int i = team.y; i < h; i += team.ny) {
        double* __restrict__ row = products + i * n;
        for (int j = team.x; j < n; j += team.nx) row[j] = 0.0;
        for (int l = 0; l < h; ++l) {
            const double r = correlation[i * h + l];
            for (int j = team.x; j < n; j += team.nx) row[j] += r * v[l * n + j];
        }
        for (int j = team.x; j < n; j += team.nx) row[j] *= v[i * n + j];
    }
    team.sync();
    for (int j = team.y * team.nx + team.x; j < n; j += team.nx * team.ny) {
        double total = 0.0;
        for (int i = 0; i < h; ++i) total += products[i * n + j];
        norms[j] = total;
    }
    team.sync();
}

// W and b of one try from the representation's statistics and the draw P = [p_1; P_Z; P_Y], B = s.readout.
//   absolute: W = alpha (P_Z + beta B P_Y),  b = alpha (p_1 + beta (ybar - zbar B) P_Y)      (equation 7.2)
//   relative: with Zt = (Z - zbar) / std and Bt the read-out for it, unit j of the layer has the pre-activation
//     alpha / sqrt(1 + beta^2) (Zt p / std(Zt p) + beta Zt Bt q / std(Zt Bt q)) + alpha bias_scale p_1
//     for columns p of P_Z and q of P_Y; a term without variance is left out, constant columns get weight 0.
// `work`: form_work_size doubles. out.bias_shifted and out.shift are left to the caller.
template <class Team>
PLATONIC_HD void form_candidate(const Team& team, int h, int k, int n, const NarrowRule& rule, const Stats& s,
                                const double* y_mean, double weight_sum, const double* __restrict__ normals,
                                const Candidate& out, double* __restrict__ work) {
    const double* __restrict__ pz = normals + n, * __restrict__ py = pz + h * n;
    const double to_std = 1.0 / root(weight_sum);
    double* __restrict__ w = out.weights;
    for (int i = team.y; i < h; i += team.ny) {  // first the Y part: B P_Y, or Bt P_Y
        const double scale = rule.relative ? s.norm[i] * to_std : 1.0;
        for (int j = team.x; j < n; j += team.nx) w[i * n + j] = 0.0;
        for (int r = 0; r < k; ++r) {
            const double b = s.readout[i * k + r] * scale;
            for (int j = team.x; j < n; j += team.nx) w[i * n + j] += b * py[r * n + j];
        }
    }
    team.sync();
    if (rule.relative) {
        double *z_norms = work + h * n, *y_norms = z_norms + n;
        quadratic_forms(team, h, n, s.correlation, pz, work, z_norms);
        quadratic_forms(team, h, n, s.correlation, w, work, y_norms);
        const double mix = rule.alpha / root(1.0 + rule.beta * rule.beta);
        for (int j = team.y * team.nx + team.x; j < n; j += team.nx * team.ny) {
            z_norms[j] = z_norms[j] > 0.0 ? mix / root(z_norms[j]) : 0.0;
            y_norms[j] = y_norms[j] > 0.0 ? mix * rule.beta / root(y_norms[j]) : 0.0;
        }
        team.sync();
        for (int i = team.y; i < h; i += team.ny) {
            const double unscale = s.inverse[i] / to_std;
            for (int j = team.x; j < n; j += team.nx)
                w[i * n + j] = unscale * (z_norms[j] * pz[i * n + j] + y_norms[j] * w[i * n + j]);
        }
    } else {
        // The intercept of the read-out belongs to B: b gets (ybar - zbar B) P_Y, found here before w is mixed.
        for (int j = team.y * team.nx + team.x; j < n; j += team.nx * team.ny) {
            double total = 0.0;
            for (int r = 0; r < k; ++r) total += y_mean[r] * py[r * n + j];
            for (int i = 0; i < h; ++i) total -= s.mean[i] * w[i * n + j];
            out.bias[j] = rule.alpha * (normals[j] + rule.beta * total);
        }
        team.sync();
        for (int i = team.y; i < h; i += team.ny)
            for (int j = team.x; j < n; j += team.nx)
                w[i * n + j] = rule.alpha * (pz[i * n + j] + rule.beta * w[i * n + j]);
    }
    team.sync();
    if (rule.relative) {
        for (int j = team.y * team.nx + team.x; j < n; j += team.nx * team.ny) {
            double total = rule.alpha * rule.bias_scale * normals[j];
            for (int i = 0; i < h; ++i) total -= s.mean[i] * w[i * n + j];
            out.bias[j] = total;
        }
    }
    team.sync();
}

// out.bias_shifted = b + W' shift_in: what a representation stored minus shift_in needs.
template <class Team>
PLATONIC_HD void shift_bias(const Team& team, int h, int n, const double* shift_in, const Candidate& out) {
    for (int j = team.y * team.nx + team.x; j < n; j += team.nx * team.ny) {
        double total = out.bias[j];
        for (int i = 0; i < h; ++i) total += shift_in[i] * out.weights[i * n + j];
        out.bias_shifted[j] = total;
    }
    team.sync();
}

// out [h + 1][k]: the read-out's coefficients, then its intercept ybar - mean' B.
template <class Team>
PLATONIC_HD void write_readout(const Team& team, int h, int k, const Stats& s, const double* y_mean, double* out) {
    for (int r = team.y * team.nx + team.x; r < k; r += team.nx * team.ny) {
        double intercept = y_mean[r];
        for (int i = 0; i < h; ++i) {
            out[i * k + r] = s.readout[i * k + r];
            intercept -= s.mean[i] * s.readout[i * k + r];
        }
        out[h * k + r] = intercept;
    }
}

}  // namespace narrow
}  // namespace platonic
