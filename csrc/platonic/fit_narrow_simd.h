// What the CPU driver of fit_narrow asks of the code compiled per instruction set. Private to the CPU side.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "platonic/fit_narrow.h"
#include "platonic/fit_narrow_math.h"

namespace platonic {

// A layer on shifted representations: z -> act(z W + bias) - shift.
struct NarrowMap {
    int h_in, h_out;
    const double *weights, *bias, *shift;
    Activation activation;
};

// One task of a sweep: panels [first, last). First `advance` (if any) replaces the representation in z, then sums of
// every try are gathered: of what `tries` maps it to, or of the representation itself where there is no try.
struct NarrowSweep {
    int64_t m, panel_stride;  // panel_stride: doubles between the panels of z
    int k;
    bool weighted;
    double* z;
    const double* targets;
    const NarrowMap* advance;  // nullptr: nothing to do first
    const NarrowMap* tries;
    int n_tries;  // 0: sums of z itself, which has `width` columns
    int width;
    bool keep;  // write what the (single) try maps to back to z
};

constexpr int narrow_chunk = 4;  // panels over which sums stay in vector lanes

PLATONIC_FOR_EACH_ISA(
    // Doubles of work (64-byte aligned) that the next two need where no representation has more than h columns.
    int64_t narrow_sweep_work(int64_t h, int64_t k);
    // sums: [max(n_tries, 1)][sums_size], overwritten.
    void narrow_sweep(const NarrowSweep& sweep, int64_t first, int64_t last, double* sums, double* work);
    // Only the first half of a sweep: z through sweep.advance.
    void narrow_advance(const NarrowSweep& sweep, int64_t first, int64_t last, double* work);
    // out [h_out][narrow_pilot] = map of z [h_in][narrow_pilot], and its shift from the first `rows` rows.
    void narrow_advance_pilot(const NarrowMap& map, int64_t rows, const double* z, double* out, double* shift);
    void narrow_solve(int h, int k, const double* sums, const double* shift, double weight_sum, double y_square,
                      const NarrowRule& rule, const narrow::Stats& stats, double* work);
    void narrow_form(int h, int k, int n, const NarrowRule& rule, const narrow::Stats& stats, const double* y_mean,
                     double weight_sum, const double* normals, const double* shift_in, const narrow::Candidate& out,
                     double* work);)

}  // namespace platonic
