// One system in shared memory: a warp each, several a block, up to p = 32, a block each beyond. Right-hand sides beyond
// right_slice and the values of l2 are further groups (grid y and z), which load or sum the Gram matrix again.
#include <algorithm>
#include <cmath>

#include "common/cuda_utils.cuh"
#include "platonic/batched_ridge.h"
#include "platonic/batched_ridge_device.cuh"

namespace platonic {
namespace {

using namespace device;

constexpr int block_size = 128;
constexpr int data_rows = 8;  // rows of data in shared memory at a time
constexpr int grid_limit = 65535;

// Values of the arithmetic's type that a system takes: triangle, spare, `refused`; then rows of data and the shift.
int64_t shared_values(int width, int slice, bool data) {
    const int rows = width + slice;
    return column_start(width, rows) + 2 + (data ? (data_rows + 1) * rows : 0);
}

template <class T, class Out, class G>
__device__ void store_weights(const G& group, const T* lower, int width, int rows, int constant, int first,
                              Out* weights, int64_t r) {
    const int p = width - constant, count = rows - width;
    for (int e = group.rank; e < p * count; e += group.size) {
        const int j = e / count + constant, c = e % count;
        const T w = lower[column_start(j, rows) + width + c - j];
        weights[(j - constant) * r + c] = first != 0 ? static_cast<Out>(NAN) : static_cast<Out>(w);
    }
}

// Grid: x systems, y values of l2, z slices of right-hand sides.
template <class T, bool Warp>
__global__ void solve_gram(GramSystems<T> s, int values) {
    PLATONIC_DYNAMIC_SHARED(double, memory);
    const Group<Warp> group;
    const int own = Warp ? threadIdx.x / warp_size : 0, systems = Warp ? blockDim.x / warp_size : 1;
    T* lower = reinterpret_cast<T*>(memory) + static_cast<int64_t>(own) * values;
    const int p = static_cast<int>(s.p);
    const int64_t start = static_cast<int64_t>(blockIdx.z) * right_slice;
    for (int64_t c0 = start; c0 < s.r || c0 == 0; c0 += static_cast<int64_t>(gridDim.z) * right_slice) {
        const int count = static_cast<int>(s.r - c0 < right_slice ? s.r - c0 : right_slice), rows = p + count;
        T* spare = lower + column_start(p, rows);
        int* refused = reinterpret_cast<int*>(spare + 1);
        for (int64_t b = static_cast<int64_t>(blockIdx.x) * systems + own; b < s.batch;
             b += static_cast<int64_t>(gridDim.x) * systems) {
            for (int64_t l = blockIdx.y; l < s.grid; l += gridDim.y) {
                group.sync();
                const T* gram = s.gram + b * p * p;
                for (int e = group.rank; e < p * p; e += group.size) {
                    const int i = e / p, j = e % p;
                    if (j <= i)
                        lower[column_start(j, rows) + i - j] = gram[e] + (i == j ? static_cast<T>(s.l2[l]) : T(0));
                }
                const T* right = s.right + b * p * s.r + c0;
                for (int e = group.rank; e < p * count; e += group.size) {
                    const int i = e / count, c = e % count;
                    lower[column_start(i, rows) + p + c - i] = right[i * s.r + c];
                }
                const int first = factor(group, lower, p, rows, static_cast<T>(s.tolerance), spare, refused);
                substitute_back(group, lower, p, rows);
                store_weights(group, lower, p, rows, 0, first, s.weights + (b * s.grid + l) * p * s.r + c0, s.r);
                if (group.rank == 0 && c0 == 0) s.status[b * s.grid + l] = first;
            }
        }
    }
}

template <class T, bool Warp>
__global__ void solve_data(DataSystems<T> s, int values) {
    PLATONIC_DYNAMIC_SHARED(double, memory);
    const Group<Warp> group;
    const int own = Warp ? threadIdx.x / warp_size : 0, systems = Warp ? blockDim.x / warp_size : 1;
    double* lower = memory + static_cast<int64_t>(own) * values;
    const int p = static_cast<int>(s.p), constant = s.intercepts != nullptr, width = p + constant;
    const int64_t start = static_cast<int64_t>(blockIdx.z) * right_slice;
    for (int64_t c0 = start; c0 < s.r || c0 == 0; c0 += static_cast<int64_t>(gridDim.z) * right_slice) {
        const int count = static_cast<int>(s.r - c0 < right_slice ? s.r - c0 : right_slice), rows = width + count;
        double* spare = lower + column_start(width, rows);
        int* refused = reinterpret_cast<int*>(spare + 1);
        double *data = spare + 2, *shift = data + data_rows * rows;
        for (int64_t b = static_cast<int64_t>(blockIdx.x) * systems + own; b < s.batch;
             b += static_cast<int64_t>(gridDim.x) * systems) {
            for (int64_t l = blockIdx.y; l < s.grid; l += gridDim.y) {
                group.sync();
                const T* x = s.x + b * s.m * p;
                const T* y = s.y + b * s.m * s.r + c0;
                for (int i = group.rank; i < column_start(width, rows); i += group.size) lower[i] = 0;
                // Relative to the first row, centring by the constant's pivot loses no digits to the data's offset.
                for (int f = group.rank; f < rows; f += group.size)
                    shift[f] = !constant || f == 0 ? 0.0 : f < width ? x[f - 1] : y[f - width];
                group.sync();
                for (int64_t k = 0; k < s.m; k += data_rows) {
                    const int here = static_cast<int>(s.m - k < data_rows ? s.m - k : data_rows);
                    for (int e = group.rank; e < here * rows; e += group.size) {
                        const int f = e % rows;
                        const int64_t row = k + e / rows;
                        const double v = f < constant ? 1.0
                                         : f < width  ? x[row * p + f - constant]
                                                      : y[row * s.r + f - width];
                        data[e] = v - shift[f];
                    }
                    group.sync();
                    add_gram(group, lower, data, here, width, rows);
                    group.sync();
                }
                for (int j = constant + group.rank; j < width; j += group.size) lower[column_start(j, rows)] += s.l2[l];
                const int first = factor(group, lower, width, rows, s.tolerance, spare, refused);
                substitute_back(group, lower, width, rows);
                const int64_t at = b * s.grid + l;
                store_weights(group, lower, width, rows, constant, first, s.weights + at * p * s.r + c0, s.r);
                for (int c = group.rank; constant && c < count; c += group.size) {
                    double intercept = lower[width + c] + shift[width + c];
                    for (int j = 1; j < width; ++j)
                        intercept -= lower[column_start(j, rows) + width + c - j] * shift[j];
                    s.intercepts[at * s.r + c0 + c] = static_cast<T>(first != 0 ? NAN : intercept);
                }
                if (group.rank == 0 && c0 == 0) s.status[at] = refused_feature(first, constant);
            }
        }
    }
}

template <class Systems>
void solve_all(void (*warp)(Systems, int), void (*block)(Systems, int), const Systems& s, int width, bool data,
               int64_t value_bytes, const Launch& on) {
    if (s.batch == 0 || s.grid == 0) return;
    const DeviceGuard guard(on.device);
    const bool small = width <= warp_size;
    const int slice = static_cast<int>(std::min<int64_t>(s.r, right_slice));
    const int64_t values = (shared_values(width, slice, data) + 1) / 2 * 2;  // doubles stay aligned
    // As many warps, up to four, as fit the 48 KiB that every device grants unasked.
    const int64_t fit = std::max<int64_t>(1, 48 * 1024 / (values * value_bytes));
    const int systems = small ? static_cast<int>(std::min<int64_t>(fit, block_size / warp_size)) : 1;
    const int64_t bytes = values * value_bytes * systems;
    void (*const kernel)(Systems, int) = small ? warp : block;
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>((s.batch + systems - 1) / systems, int64_t(1) << 20)),
                    static_cast<unsigned>(std::min<int64_t>(s.grid, grid_limit)),
                    static_cast<unsigned>(
                        std::min<int64_t>(std::max<int64_t>(1, (s.r + right_slice - 1) / right_slice), grid_limit)));
    const int threads = small ? systems * warp_size : block_size;
    launch("batched_ridge", kernel, {grid, threads, bytes}, on, s, static_cast<int>(values));
}

template <class T>
void solve(const GramSystems<T>& s, const Launch& on) {
    solve_all(solve_gram<T, true>, solve_gram<T, false>, s, static_cast<int>(s.p), false, sizeof(T), on);
}

template <class T>
void solve(const DataSystems<T>& s, const Launch& on) {
    const int width = static_cast<int>(s.p) + (s.intercepts != nullptr);
    solve_all(solve_data<T, true>, solve_data<T, false>, s, width, true, sizeof(double), on);
}

}  // namespace

namespace cuda {
void batched_ridge(const GramSystems<float>& s, const Launch& on) { solve(s, on); }
void batched_ridge(const GramSystems<double>& s, const Launch& on) { solve(s, on); }
void batched_ridge(const DataSystems<float>& s, const Launch& on) { solve(s, on); }
void batched_ridge(const DataSystems<double>& s, const Launch& on) { solve(s, on); }
}  // namespace cuda

}  // namespace platonic
