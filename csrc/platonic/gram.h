// gram: one streaming pass over the rows of x that returns the weighted mean and the centred second moments of
// v = [z | y], where z is x itself or a layer act(x W + b) computed block by block in cache.
//
//   total = sum_i w_i        mean = sum_i w_i v_i / total        gram = sum_i w_i (v_i - mean) (v_i - mean)^T
//
// Units: gram is not divided by total. All three are float64; with total = 0 (no rows, or weights all zero) they are 0.
//
// Accuracy. Sums are taken about a shift, the mean of the first rows of each run of gram_segment_rows rows, so data
// far from 0 loses nothing (exact rank-1 correction in float64 afterwards). float32: products are summed in float32
// over gram_block_rows rows and in float64 beyond, so that with u = 2^-24
//   |error(gram_ij)| <= (gram_block_rows + 3) u sum_i w_i |v_i - shift|_i |v_i - shift|_j   (to first order in u),
// plus the rounding of z itself where a layer is fused; |v - shift| must stay below 1e18 (its square is float32).
// float64: the same with u = 2^-53.
//
// Deterministic: rows are cut by the number of rows alone and partial results are merged in row order, so the result
// has the same bits for any number of threads, and for every run on one CUDA device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/launch.h"

namespace platonic {

constexpr int64_t gram_block_rows = 128;
constexpr int64_t gram_segment_rows = 4096;

struct GramArgs {
    bool is_double;          // element type T of every void pointer: float64 or float32
    int64_t rows;            // m
    int64_t columns;         // n
    int64_t row_stride;      // elements from one row of x to the next; its columns are contiguous
    const void* x;           // T [m, n]
    const void* x_mean;      // T [n] or null: x is replaced by (x - x_mean) * x_factor; both or neither
    const void* x_factor;    // T [n] or null
    const void* weight;      // T [n, width] or null: z = x
    const void* bias;        // T [width] or null
    int activation;          // Activation, of the fused layer
    int64_t width;           // columns of z: n without weight
    const void* y;           // T [m, targets] or null
    int64_t targets;         // columns of y, 0 without
    const void* row_weight;  // T [m] or null (all 1), not negative
    void* z;                 // T [m, width] or null: the layer's output is also written here
    double* gram;            // [p, p], p = width + targets
    double* mean;            // [p]
    double* total;           // [1]
    void* scratch;           // CUDA: gram_scratch_bytes(rows, p) bytes, 16-byte aligned; CPU: null
};

// Device scratch of the CUDA kernel: one partial result (second moments, sums, shift, weight) a slice of rows.
inline int64_t gram_slices(int64_t rows, int64_t p) {
    const int64_t limit = std::clamp<int64_t>((int64_t{1} << 24) / std::max<int64_t>(p * p, 1), 4, 256);
    return std::clamp<int64_t>((rows + 1023) / 1024, 1, limit);
}
inline int64_t gram_scratch_bytes(int64_t rows, int64_t p) {
    return gram_slices(rows, p) * (p * p + 2 * p + 1) * static_cast<int64_t>(sizeof(double));
}

namespace cpu {
void gram(const GramArgs& args, const Launch& on);
}
namespace cuda {
void gram(const GramArgs& args, const Launch& on);
}

}  // namespace platonic
