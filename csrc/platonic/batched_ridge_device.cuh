// Cholesky by a group of threads, a warp or a block, in shared memory: used by batched_ridge.cu and rolling_ridge.cu.
//
// Layout: the lower triangle column after column; column j holds rows j ... rows - 1, of which the first `width` are
// the matrix's and the others right-hand sides (see lane_cholesky.h: the recurrence over all rows does the forward
// substitution). Consecutive threads take consecutive rows, so that their accesses to a column fall into different
// banks and those to a row's head are broadcasts. A factor's diagonal holds reciprocals.
#pragma once

#include "platonic/batched_ridge_math.h"

namespace platonic {
namespace device {

constexpr int warp_size = 32;
constexpr int right_slice = 16;  // right-hand sides that a group takes at a time

// Threads that work on one system.
template <bool Warp>
struct Group {
    int rank, size;
    __device__ Group()
        : rank(Warp ? threadIdx.x % warp_size : threadIdx.x), size(Warp ? warp_size : static_cast<int>(blockDim.x)) {}
    __device__ void sync() const {
        if (Warp)
            __syncwarp();
        else
            __syncthreads();
    }
};

// lower[i, j] += sum over `count` rows of data[row, i] data[row, j]; data [count, rows].
template <class G>
__device__ void add_gram(const G& group, double* lower, const double* data, int count, int width, int rows) {
    for (int j = 0; j < width; ++j)
        for (int i = j + group.rank; i < rows; i += group.size) {
            double sum = 0;
            for (int k = 0; k < count; ++k) sum += data[k * rows + i] * data[k * rows + j];
            lower[column_start(j, rows) + i - j] += sum;
        }
}

// Factors the first `width` columns in place; behind them lies one spare value and then `refused`. Left-looking: the
// finished columns are taken out of column j, a thread a row; the pivot is always rank 0's. Returns to every thread 0
// or 1 + the first refused pivot. Starts and ends with a barrier.
template <class T, class G>
__device__ int factor(const G& group, T* lower, int width, int rows, T tolerance, T* spare, int* refused) {
    int first = 0;
    for (int j = 0; j < width; ++j) {
        group.sync();
        T* column = lower + column_start(j, rows);
        for (int i = j + group.rank; i < rows; i += group.size) {
            T sum = column[i - j];
            for (int k = 0; k < j; ++k) {
                const T* done = lower + column_start(k, rows) - k;
                sum -= done[i] * done[j];
            }
            if (i > j) {
                column[i - j] = sum;
            } else {
                if (first == 0 && refuse_pivot(sum, column[0], tolerance)) first = j + 1;
                *spare = T(1) / sqrt(sum);
            }
        }
        group.sync();
        const T reciprocal = *spare;
        for (int i = j + group.rank; i < rows; i += group.size)
            column[i - j] = i == j ? reciprocal : column[i - j] * reciprocal;
    }
    if (group.rank == 0) *refused = first;
    group.sync();
    return *refused;
}

// Rows width ... rows - 1, which hold L^-1 C, become the solutions, right-hand side c in row width + c.
template <class T, class G>
__device__ void substitute_back(const G& group, T* lower, int width, int rows) {
    const int count = rows - width;
    for (int j = width - 1; j >= 0; --j) {
        T* column = lower + column_start(j, rows) - j;
        const T reciprocal = column[j];
        for (int c = group.rank; c < count; c += group.size) column[width + c] *= reciprocal;
        group.sync();
        for (int e = group.rank; e < j * count; e += group.size) {
            const int k = e / count, row = width + e % count;
            T* above = lower + column_start(k, rows) - k;
            above[row] -= above[j] * column[row];
        }
        group.sync();
    }
}

}  // namespace device
}  // namespace platonic
