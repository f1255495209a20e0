// Fits many thin layers of a closed-form network in one call (thesis chapter 7, sections 7.3.2, 7.5 and equation 7.2).
//
// m rows, k targets, h_i columns after layer i (h_0: columns handed in). All numbers are float64. Layer i takes the
// representation Z [m, h_in] and, for each of n_tries draws P [1 + h_in + k, h_out] of the caller, forms W, b without
// looking at the rows (fit_narrow_math.h), applies Z_t = act(Z W + b), and scores it by the least squares distance
// LSD = sum_r w_r |y_r - ridge read-out of z_r|^2 / sum w. The best try is kept; its Gram matrix and read-out, which
// scored it, form the next layer's W.
//
// Rows lie in panels of narrow_panel rows, each column of a panel contiguous: element (r, j) of an array with c
// columns is at [r / narrow_panel][j][r % narrow_panel], c = width_max for z and k + 1 for targets. Rows from m to
// the end of the last panel are zero.
//
// The representation is stored minus `shift`, one number per column near its mean, so that Gram matrices lose nothing
// to the column means. It is the only state: a call that starts from the z and shift that another call left continues
// that fit, bit for bit.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/launch.h"

namespace platonic {

constexpr int narrow_panel = 128;     // rows of a panel
constexpr int narrow_max_width = 64;  // columns of a representation, and targets
constexpr int narrow_pilot = 64;      // evenly spaced rows whose mean is a new representation's shift

// How a layer is formed. See form_candidate in fit_narrow_math.h for the formulas.
struct NarrowRule {
    double alpha, beta;
    double bias_scale;  // relative scaling only
    double l2;          // ridge penalty: of the raw columns, or (relative) of standardised columns, per unit of weight
    double jitter;      // first value added to a unit diagonal whose factorisation breaks down; grows tenfold
    bool relative;
};

struct FitNarrow {
    int64_t m, k, layers, n_tries;
    int64_t width_max;      // the largest of widths
    const int64_t* widths;  // [layers + 1], on the host: columns of z handed in, then after each layer
    Activation activation;
    NarrowRule rule;
    bool weighted;  // false: every weight is 1

    double* z;              // [panels][width_max][narrow_panel], in and out
    double* shift;          // [width_max], in and out
    const double* targets;  // [panels][k + 1][narrow_panel]: the weights w, then w (y - ybar)
    const double* y_stats;  // [k + 2]: ybar, sum w |y - ybar|^2, sum w
    const double* normals;  // for each layer [n_tries][1 + h_in + k][h_out]: rows for bias, Z and Y

    double* weights;  // for each layer [h_in][h_out]
    double* biases;   // for each layer [h_out]
    double* lsd;      // [layers + 1]: of the representation handed in, then after each layer
    double* jitter;   // [layers + 1]: what was added to the diagonal of the system behind that lsd, mostly 0
    int64_t* winner;  // [layers]: the try that was kept
    double* readout;  // [h_last + 1][k]: coefficients of the last representation, then the intercept
    int64_t* status;  // [1]: -1, or i when representation i (0: handed in) was not finite for any try; outputs
                      // from there on are undefined
    double* scratch;  // narrow_scratch_size(...) doubles on the device; unused on the CPU
};

constexpr int64_t narrow_panels(int64_t m) { return (m + narrow_panel - 1) / narrow_panel; }

namespace cpu {
void fit_narrow(const FitNarrow& args, const Launch& on);
}

namespace cuda {
int64_t narrow_scratch_size(int64_t m, int64_t k, int64_t width_max, int64_t n_tries);
void fit_narrow(const FitNarrow& args, const Launch& on);
}  // namespace cuda

}  // namespace platonic
