// gram on CUDA. A block owns one slice of rows and one pair of 64-column tiles of the lower triangle. It stages 16
// rows of both tiles in shared memory (copied, standardised or multiplied by the layer's weights, then shifted and
// scaled by the root of the row's weight), and each of its 256 threads adds to 4 x 4 products. A second kernel
// merges the slices in order, one thread an element. No atomics: the same bits in every run.
//
// With a fused layer, z is computed anew for every pair of tiles: meant for p <= 64, where there is one.
#include "common/activation.h"
#include "common/cuda_utils.cuh"
#include "platonic/gram.h"
#include "platonic/gram_math.h"

namespace platonic {
namespace {

constexpr int tile = 64, step = 16, side = 16, per_thread = tile / side, threads = side * side;

// One slice's part of the scratch.
struct Slice {
    double *moments, *sums, *shift, *total;
};

__device__ Slice slice_at(const GramArgs& a, int64_t p, int64_t slice) {
    double* base = static_cast<double*>(a.scratch) + slice * (p * p + 2 * p + 1);
    return {base, base + p * p, base + p * p + p, base + p * p + 2 * p};
}

template <class T>
__device__ T input_at(const GramArgs& a, int64_t row, int64_t i) {
    const T x = static_cast<const T*>(a.x)[row * a.row_stride + i];
    if (a.x_mean == nullptr) return x;
    return (x - static_cast<const T*>(a.x_mean)[i]) * static_cast<const T*>(a.x_factor)[i];
}

// v[row][column] for column < p.
template <class T>
__device__ T value_at(const GramArgs& a, int64_t row, int64_t column) {
    if (column >= a.width) return static_cast<const T*>(a.y)[row * a.targets + column - a.width];
    if (a.weight == nullptr) return input_at<T>(a, row, column);
    const T* weight = static_cast<const T*>(a.weight) + column;
    T sum = a.bias == nullptr ? T(0) : static_cast<const T*>(a.bias)[column];
    for (int64_t i = 0; i < a.columns; ++i) sum += input_at<T>(a, row, i) * weight[i * a.width];
    return activate(static_cast<Activation>(a.activation), sum);
}

// Mean of the first rows of a slice: what its sums are taken about.
template <class T>
__device__ T shift_at(const GramArgs& a, int64_t p, int64_t first, int64_t last, int64_t column) {
    const int64_t count = last - first < step ? last - first : step;
    if (column >= p || count <= 0) return T(0);
    double sum = 0;
    for (int64_t r = 0; r < count; ++r) sum += value_at<T>(a, first + r, column);
    return static_cast<T>(sum / count);
}

template <class T>
__global__ void __launch_bounds__(threads) partial_moments(GramArgs a, int64_t p, int64_t slice_rows) {
    __shared__ T left[step][tile], right[step][tile], left_shift[tile], right_shift[tile], root[step];
    const int tid = threadIdx.x, tx = tid % side, ty = tid / side;
    const int64_t first = blockIdx.x * slice_rows;
    const int64_t last = first + slice_rows < a.rows ? first + slice_rows : a.rows;
    // Pair (i, j) of tiles with j <= i, counted along the lower triangle.
    int64_t tile_i = 0, pair = blockIdx.y;
    while (pair > tile_i) pair -= ++tile_i;
    const int64_t tile_j = pair, i0 = tile_i * tile, j0 = tile_j * tile;
    const bool diagonal = tile_i == tile_j;

    if (tid < tile)
        left_shift[tid] = shift_at<T>(a, p, first, last, i0 + tid);
    else if (tid < 2 * tile)
        right_shift[tid - tile] = shift_at<T>(a, p, first, last, j0 + tid - tile);

    double moments[per_thread][per_thread] = {};
    T block[per_thread][per_thread] = {};
    double sum = 0, total = 0;
    const T* weight = static_cast<const T*>(a.row_weight);
    for (int64_t row = first; row < last; row += step) {
        __syncthreads();  // shifts are there; the previous rows have been used
        if (tid < step) {
            const double w = row + tid >= last ? 0.0 : weight == nullptr ? 1.0 : double(weight[row + tid]);
            root[tid] = static_cast<T>(sqrt(w));
        }
        __syncthreads();
        for (int k = tid; k < step * tile; k += threads) {
            const int r = k / tile, c = k % tile;
            const bool inside = row + r < last;
            T v = T(0);
            if (inside && i0 + c < p) {
                v = value_at<T>(a, row + r, i0 + c);
                if (diagonal && a.z != nullptr && i0 + c < a.width)
                    static_cast<T*>(a.z)[(row + r) * a.width + i0 + c] = v;
                v = (v - left_shift[c]) * root[r];
            }
            left[r][c] = v;
            if (!diagonal)  // then j0 + c < p
                right[r][c] = inside ? (value_at<T>(a, row + r, j0 + c) - right_shift[c]) * root[r] : T(0);
        }
        __syncthreads();
        const T(*other)[tile] = diagonal ? left : right;
#pragma unroll
        for (int r = 0; r < step; ++r) {
            T u[per_thread], v[per_thread];
#pragma unroll
            for (int k = 0; k < per_thread; ++k) u[k] = left[r][ty + side * k], v[k] = other[r][tx + side * k];
#pragma unroll
            for (int k = 0; k < per_thread; ++k)
#pragma unroll
                for (int l = 0; l < per_thread; ++l) block[k][l] += u[k] * v[l];
        }
        if (diagonal && tid < tile)
            for (int r = 0; r < step; ++r) sum += double(left[r][tid]) * root[r];
        if (blockIdx.y == 0 && tid == 0)
            for (int r = 0; r < step && row + r < last; ++r) total += weight == nullptr ? 1.0 : double(weight[row + r]);
        if ((row - first) / step % (gram_block_rows / step) == gram_block_rows / step - 1 || row + step >= last)
#pragma unroll
            for (int k = 0; k < per_thread; ++k)
#pragma unroll
                for (int l = 0; l < per_thread; ++l) moments[k][l] += block[k][l], block[k][l] = T(0);
    }
    __syncthreads();  // shifts of a slice without rows

    const Slice out = slice_at(a, p, blockIdx.x);
    for (int k = 0; k < per_thread; ++k)
        for (int l = 0; l < per_thread; ++l) {
            const int64_t i = i0 + ty + side * k, j = j0 + tx + side * l;
            if (i < p && j <= i) out.moments[i * p + j] = moments[k][l];
        }
    if (diagonal && tid < tile && i0 + tid < p) {
        out.sums[i0 + tid] = sum;
        out.shift[i0 + tid] = left_shift[tid];
    }
    if (blockIdx.y == 0 && tid == 0) *out.total = total;
}

// One thread an element (i, j), j <= i, of the result; slices are merged in order.
__global__ void combine_moments(GramArgs a, int64_t p, int64_t slices) {
    const int64_t i = blockIdx.y * static_cast<int64_t>(blockDim.y) + threadIdx.y;
    const int64_t j = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    if (i >= p || j > i) return;
    double moment = 0, mean_i = 0, mean_j = 0, total = 0;
    for (int64_t s = 0; s < slices; ++s) {
        const Slice part = slice_at(a, p, s);
        const double w = *part.total;
        if (!(w != 0)) continue;
        const double part_i = part.shift[i] + part.sums[i] / w, part_j = part.shift[j] + part.sums[j] / w;
        const double centred = centre_moment(part.moments[i * p + j], part.sums[i], part.sums[j], w);
        if (total == 0) {
            moment = centred, mean_i = part_i, mean_j = part_j, total = w;
            continue;
        }
        const double delta_i = part_i - mean_i, delta_j = part_j - mean_j;
        moment = merge_moment(moment, centred, delta_i, delta_j, merge_factor(total, w));
        mean_i = merge_mean(mean_i, delta_i, total, w);
        mean_j = merge_mean(mean_j, delta_j, total, w);
        total += w;
    }
    a.gram[i * p + j] = a.gram[j * p + i] = moment;
    if (i == j) a.mean[i] = mean_i;
    if (i == 0) *a.total = total;
}

}  // namespace

namespace cuda {

void gram(const GramArgs& args, const Launch& on) {
    const DeviceGuard guard(on.device);
    const int64_t p = args.width + args.targets;
    const int64_t tiles = (p + tile - 1) / tile, pairs = tiles * (tiles + 1) / 2;
    if (pairs > 65535) throw std::invalid_argument("gram: expected at most 23104 columns of [z | y] on CUDA");
    const int64_t slices = gram_slices(args.rows, p);
    const int64_t slice_rows = ((args.rows + slices - 1) / slices + step - 1) / step * step;
    const dim3 grid(static_cast<unsigned>(slices), static_cast<unsigned>(pairs));
    const auto kernel = args.is_double ? partial_moments<double> : partial_moments<float>;
    launch("gram: partial moments", kernel, {grid, threads}, on, args, p, slice_rows);
    const unsigned blocks = static_cast<unsigned>((p + side - 1) / side);
    launch("gram: combine", combine_moments, {dim3(blocks, blocks), dim3(side, side)}, on, args, p, slices);
}

}  // namespace cuda
}  // namespace platonic
