// The passes of sorted_pca on CUDA. centred_product: a block owns a slice of rows and takes 32 at a time: its warps
// compute their dot products with the vectors, then its threads, each owning columns, add the weighted rows, read
// again from cache, to the slice's float64 partial result in scratch; a second kernel adds the slices in order.
// project_rows: a warp a row, in float64. No atomics: the same bits in every run.
#include "common/cuda_utils.cuh"
#include "platonic/sorted_pca.h"

namespace platonic {
namespace {

constexpr int warp = 32, threads = 256, warps = threads / warp, group_rows = 32;

template <class T>
__device__ T value_at(const JoinedRows& d, int64_t row, int64_t c) {
    if (c < d.columns) return static_cast<const T*>(d.x)[row * d.row_stride + c];
    return static_cast<const T*>(d.y)[row * d.targets + c - d.columns];
}

// The sum over a warp's lanes, in every lane.
template <class T>
__device__ T sum_warp(T v) {
    for (int distance = warp / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
    return v;
}

template <class T, int B>
__global__ void __launch_bounds__(threads) partial_products(CentredProductArgs a, int64_t p, int64_t slice_rows) {
    __shared__ T factors[group_rows][B + 1];
    const JoinedRows d = a.data;
    const T *shift = static_cast<const T*>(a.shift), *vectors = static_cast<const T*>(a.vectors);
    const T* weight = static_cast<const T*>(a.row_weight);
    const int lane = threadIdx.x % warp;
    const int64_t first = blockIdx.x * slice_rows;
    const int64_t last = first + slice_rows < d.rows ? first + slice_rows : d.rows;
    double* out = a.scratch + blockIdx.x * (B + 1) * p;
    for (int64_t i = threadIdx.x; i < (B + 1) * p; i += threads) out[i] = 0;
    __syncthreads();
    for (int64_t row = first; row < last; row += group_rows) {
        const int here = last - row < group_rows ? static_cast<int>(last - row) : group_rows;
        for (int r = threadIdx.x / warp; r < here; r += warps) {
            T dots[B] = {};
            for (int64_t c = lane; c < p; c += warp) {
                const T v = value_at<T>(d, row + r, c) - shift[c];
#pragma unroll
                for (int b = 0; b < B; ++b) dots[b] += v * vectors[b * p + c];
            }
            const T w = weight == nullptr ? T(1) : weight[row + r];
#pragma unroll
            for (int b = 0; b < B; ++b) {
                const T dot = sum_warp(dots[b]);
                if (lane == 0) {
                    factors[r][b] = w * dot;
                    if (a.dots != nullptr) static_cast<T*>(a.dots)[(row + r) * B + b] = dot;
                }
            }
            if (lane == 0) factors[r][B] = w;
        }
        __syncthreads();
        for (int64_t c = threadIdx.x; c < p; c += threads) {
            T sums[B + 1] = {};
            for (int r = 0; r < here; ++r) {
                const T v = value_at<T>(d, row + r, c) - shift[c];
#pragma unroll
                for (int b = 0; b <= B; ++b) sums[b] += v * factors[r][b];
            }
#pragma unroll
            for (int b = 0; b <= B; ++b) out[b * p + c] += sums[b];
        }
        __syncthreads();
    }
}

// One thread a number of [product | sums]; slices are added in order.
__global__ void combine_products(CentredProductArgs a, int64_t p, int64_t slices) {
    const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    const int64_t size = (a.count + 1) * p;
    if (i >= size) return;
    double sum = 0;
    for (int64_t s = 0; s < slices; ++s) sum += a.scratch[s * size + i];
    if (i < a.count * p)
        a.product[i] = sum;
    else if (a.sums != nullptr)
        a.sums[i - a.count * p] = sum;
}

template <class T>
__global__ void __launch_bounds__(threads) project(ProjectRowsArgs a, int64_t p) {
    const int lane = threadIdx.x % warp;
    const int64_t row = blockIdx.x * static_cast<int64_t>(warps) + threadIdx.x / warp;
    if (row >= a.data.rows) return;
    double sum = 0;
    for (int64_t c = lane; c < p; c += warp) sum += (double(value_at<T>(a.data, row, c)) - a.shift[c]) * a.direction[c];
    sum = sum_warp(sum);
    if (lane == 0) a.out[row] = sum;
}

template <class T>
void (*products_of(int64_t vectors))(CentredProductArgs, int64_t, int64_t) {
    switch (vectors) {
        case 1:
            return partial_products<T, 1>;
        case 2:
            return partial_products<T, 2>;
        case 3:
            return partial_products<T, 3>;
        default:
            return partial_products<T, 4>;
    }
}

}  // namespace

namespace cuda {

void centred_product(const CentredProductArgs& args, const Launch& on) {
    const DeviceGuard guard(on.device);
    const int64_t p = args.data.columns + args.data.targets, slices = product_slices(args.data.rows);
    const int64_t slice_rows = (args.data.rows + slices - 1) / slices;
    const auto kernel = args.data.is_double ? products_of<double>(args.count) : products_of<float>(args.count);
    launch("sorted_pca: partial products", kernel, slices, threads, on, args, p, slice_rows);
    const int64_t blocks = ((args.count + 1) * p + threads - 1) / threads;
    launch("sorted_pca: combine", combine_products, blocks, threads, on, args, p, slices);
}

void project_rows(const ProjectRowsArgs& args, const Launch& on) {
    const DeviceGuard guard(on.device);
    if (args.data.rows == 0) return;
    const int64_t p = args.data.columns + args.data.targets;
    const int64_t blocks = (args.data.rows + warps - 1) / warps;
    const auto kernel = args.data.is_double ? project<double> : project<float>;
    launch("sorted_pca: project", kernel, blocks, threads, on, args, p);
}

}  // namespace cuda
}  // namespace platonic
