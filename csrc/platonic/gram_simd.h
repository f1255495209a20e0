// The part of gram that is compiled per instruction set: one segment of rows.
#pragma once

#include "common/cpu.h"
#include "platonic/gram.h"

namespace platonic {

// Strides in elements, of buffers that start on 64-byte boundaries. Strides are odd multiples of 64 bytes, so that
// equal columns of successive rows fall into different cache sets.
struct GramLayout {
    int64_t panel_stride;   // T, >= p rounded up to a tile
    int64_t weight_stride;  // T, >= width rounded up to a tile; 0 without a layer
    int64_t input_stride;   // T, >= n; 0 unless a layer follows a standardisation
    int64_t moment_stride;  // double, >= p rounded up to a tile
    int64_t moment_rows;    // p rounded up to a tile's rows
};

struct GramWorkspace {
    void* panel;         // T [gram_block_rows, panel_stride], zeroed at the start
    void* input;         // T [gram_block_rows, input_stride]
    void* shift;         // T [panel_stride], zeroed
    void* root;          // T [gram_block_rows]
    const void* weight;  // T [n, weight_stride]: the layer's weights, padded with zeros
    const void* bias;    // T [weight_stride]
    double* moments;     // [moment_rows, moment_stride]: sum w (v - shift) (v - shift)^T, lower triangle
    double* sums;        // [panel_stride]: sum w (v - shift)
    double total;        // sum w
};

PLATONIC_FOR_EACH_ISA(GramLayout gram_layout(const GramArgs&);)

// Fills moments, sums, shift and total for the rows [first, first + rows).
PLATONIC_FOR_EACH_ISA(void gram_segment(const GramArgs&, const GramLayout&, GramWorkspace&, int64_t first,
                                        int64_t rows);)

}  // namespace platonic
