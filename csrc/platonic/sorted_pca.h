// The two passes over data that the first principal component and its sorting need, on v = [x | y].
//
//   centred_product: dots[i][b] = (v_i - shift) . vectors[b],  product[b] = sum_i w_i dots[i][b] (v_i - shift),
//                    sums = sum_i w_i (v_i - shift)
//   project_rows:    out[i]     = (v_i - shift) . direction
//
// shift is any point near the mean; the caller turns products about it into products about the mean (rank 1).
// float32 products are summed in float32 over product_chunk_rows rows and in float64 beyond; project_rows is float64
// throughout. Deterministic: rows are cut by their number alone and combined in order; every row's dots and projection
// go through the same operations wherever it lies, so equal rows tie exactly.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/launch.h"

namespace platonic {

constexpr int64_t product_chunk_rows = 512;
constexpr int64_t max_product_vectors = 4;

// Rows of [x | y], p = columns + targets; T is float32 or float64.
struct JoinedRows {
    bool is_double;
    int64_t rows;        // m
    int64_t columns;     // n
    int64_t row_stride;  // elements from one row of x to the next
    const void* x;       // T [m, n]
    const void* y;       // T [m, targets] or null
    int64_t targets;
};

struct CentredProductArgs {
    JoinedRows data;
    const void* row_weight;  // T [m] or null (all 1)
    const void* shift;       // T [p]
    const void* vectors;     // T [count, p]
    int64_t count;           // 1 .. max_product_vectors
    void* dots;              // T [m, count] or null: takes (v_i - shift) . vectors[b]
    double* product;         // [count, p]
    double* sums;            // [p] or null
    double* scratch;         // CUDA: product_slices(m) * (count + 1) * p doubles; CPU: null
};

struct ProjectRowsArgs {
    JoinedRows data;
    const double* shift;      // [p]
    const double* direction;  // [p]
    double* out;              // [m]
};

inline int64_t product_slices(int64_t rows) { return std::clamp<int64_t>((rows + 63) / 64, 1, 264); }

namespace cpu {
void centred_product(const CentredProductArgs& args, const Launch& on);
void project_rows(const ProjectRowsArgs& args, const Launch& on);
}  // namespace cpu
namespace cuda {
void centred_product(const CentredProductArgs& args, const Launch& on);
void project_rows(const ProjectRowsArgs& args, const Launch& on);
}  // namespace cuda

}  // namespace platonic
