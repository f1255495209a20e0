// The parts of sorted_pca that are compiled per instruction set. Vectors over columns are padded with zeros: x's
// columns to a multiple of 64 bytes of T, then y's, so that both start on a vector.
#pragma once

#include "common/cpu.h"
#include "platonic/sorted_pca.h"

namespace platonic {

// Where column c of [x | y] lies in a padded vector, and its length. `unit` is 64 / sizeof(T).
struct PaddedColumns {
    int64_t columns, y_start, size;

    PaddedColumns(const JoinedRows& data)
        : columns(data.columns), y_start(round_up(data.columns, data)), size(y_start + round_up(data.targets, data)) {}
    int64_t at(int64_t c) const { return c < columns ? c : y_start + (c - columns); }

private:
    static int64_t round_up(int64_t n, const JoinedRows& data) {
        const int64_t unit = data.is_double ? 8 : 16;
        return (n + unit - 1) / unit * unit;
    }
};

// acc [count + 1, size], T: adds the products, then (if a.sums) the sums, of rows [first, first + rows).
PLATONIC_FOR_EACH_ISA(void product_chunk(const CentredProductArgs&, const PaddedColumns&, const void* shift,
                                         const void* vectors, int64_t first, int64_t rows, void* acc);)

PLATONIC_FOR_EACH_ISA(void project_chunk(const ProjectRowsArgs&, const PaddedColumns&, const double* shift,
                                         const double* direction, int64_t first, int64_t rows);)

}  // namespace platonic
