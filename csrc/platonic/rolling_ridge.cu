// One segment a block (and up to right_slice targets): the factor L D L' in shared memory by columns, a thread a row.
#include <algorithm>
#include <cmath>

#include "common/cuda_utils.cuh"
#include "platonic/batched_ridge_device.cuh"
#include "platonic/rolling_ridge.h"

namespace platonic {
namespace {

using namespace device;

constexpr int block_size = 160;  // a thread a row at p = 128 with a constant and 16 targets
constexpr int chunk_rows = 8;    // rows of data in shared memory while a Gram matrix is summed

// Doubles of shared memory.
int64_t shared_values(int width, int rows) {
    return column_start(width, rows) + 2 + 2 * width + (5 + chunk_rows) * rows;
}

template <class T>
struct Segment {
    const RollingRidge<T>& task;
    Group<false> group;
    int p, constant, width, rows;  // rows: of the factor, the targets' included
    int64_t c0, first;             // first target, first row of the segment
    double *lower, *spare, *diagonal, *changed, *squares, *peaks, *shift, *in, *out, *chunk;
    int* refused;

    __device__ Segment(const RollingRidge<T>& task, double* memory, int64_t c0, int count, int64_t first)
        : task(task),
          p(static_cast<int>(task.p)),
          constant(task.intercepts != nullptr),
          width(p + constant),
          rows(width + count),
          c0(c0),
          first(first) {
        lower = memory;
        spare = lower + column_start(width, rows);
        refused = reinterpret_cast<int*>(spare + 1);
        diagonal = spare + 2;
        changed = diagonal + width;
        squares = changed + width;
        peaks = squares + rows;
        shift = peaks + rows;
        in = shift + rows;
        out = in + rows;
        chunk = out + rows;
    }

    // Row t of the data to `to`, less the shift: 0 if it does not exist or holds what is not finite. Returns, to every
    // thread, whether it is usable. All targets decide, not only this block's. Ends with a barrier.
    __device__ bool fetch(int64_t t, double* to) const {
        bool good = t >= 0 && t < task.n;
        if (good) {
            for (int64_t f = group.rank; f < task.p; f += group.size) good &= isfinite(task.x[t * task.p + f]) != 0;
            for (int64_t c = group.rank; c < task.r; c += group.size) good &= isfinite(task.y[t * task.r + c]) != 0;
        }
        good = __syncthreads_and(good) != 0;
        for (int f = group.rank; f < rows; f += group.size) {
            double v = 0;
            if (good)
                v = f < constant ? 1.0
                    : f < width  ? static_cast<double>(task.x[t * task.p + f - constant]) - shift[f]
                                 : static_cast<double>(task.y[t * task.r + c0 + f - width]) - shift[f];
            to[f] = v;
        }
        __syncthreads();
        return good;
    }

    // Relative to the segment's first row, centring by the constant's pivot loses no digits to the data's offset.
    __device__ void find_shift() {
        for (int f = group.rank; f < rows; f += group.size) shift[f] = 0;
        __syncthreads();
        if (!constant) return;
        fetch(first, in);
        for (int f = group.rank; f < rows; f += group.size) shift[f] = f == 0 ? 0.0 : in[f];
        __syncthreads();
    }

    // Gram matrix and factor of the window that ends at row t. Returns 0 or 1 + the refused pivot.
    __device__ int rebuild(int64_t t) {
        for (int i = group.rank; i < column_start(width, rows); i += group.size) lower[i] = 0;
        for (int f = group.rank; f < rows; f += group.size) squares[f] = 0;
        const int64_t begin = t - task.window + 1 > 0 ? t - task.window + 1 : 0;
        for (int64_t k = begin; k <= t; k += chunk_rows) {
            const int here = static_cast<int>(t + 1 - k < chunk_rows ? t + 1 - k : chunk_rows);
            for (int i = 0; i < here; ++i) fetch(k + i, chunk + i * rows);
            add_gram(group, lower, chunk, here, width, rows);
            for (int f = group.rank; f < rows; f += group.size)
                for (int i = 0; i < here; ++i) squares[f] += chunk[i * rows + f] * chunk[i * rows + f];
            __syncthreads();
        }
        for (int f = group.rank; f < rows; f += group.size) peaks[f] = squares[f];
        for (int j = constant + group.rank; j < width; j += group.size) lower[column_start(j, rows)] += task.l2;
        const int pivot = factor(group, lower, width, rows, task.tolerance, spare, refused);
        for (int j = 0; j < width; ++j) {
            double* column = lower + column_start(j, rows) - j;
            const double reciprocal = column[j];
            if (group.rank == 0) diagonal[j] = 1.0 / (reciprocal * reciprocal);
            for (int i = j + 1 + group.rank; i < rows; i += group.size) column[i] *= reciprocal;
        }
        __syncthreads();
        return pivot;
    }

    // Takes row `in` up and row `out` down. Returns, to every thread, whether the factor is to be built anew.
    __device__ bool step() {
        bool trouble = false;
        for (int f = group.rank; f < rows; f += group.size) {
            const double now = squares[f] + in[f] * in[f] - out[f] * out[f];
            const double peak = peaks[f] > now ? peaks[f] : now;
            squares[f] = now;
            peaks[f] = peak;
            trouble |= now < smallest_remainder * peak;
        }
        __syncthreads();
        const double kept = task.tolerance > smallest_kept_pivot ? task.tolerance : smallest_kept_pivot;
        RankOnePair pair;  // every thread runs through the same pivots
        for (int j = 0; j < width; ++j) {
            const double pivot = pair.start_column(in[j], out[j], diagonal[j]);
            trouble |= refuse_pivot(pivot, squares[j] + (j < constant ? 0.0 : task.l2), kept);
            if (group.rank == 0) changed[j] = pivot;  // others may still read diagonal[j]
            double* column = lower + column_start(j, rows) - j;
            for (int i = j + 1 + group.rank; i < rows; i += group.size) pair.change(column[i], in[i], out[i]);
            __syncthreads();
        }
        for (int j = group.rank; j < width; j += group.size) diagonal[j] = changed[j];
        trouble |= !(pair.gamma < 0 && pair.gamma > -largest_downdate);
        return __syncthreads_or(trouble) != 0;
    }

    // Solves for every target (into `chunk`: a target's unknowns side by side) and writes row t.
    __device__ void output(int64_t t, bool good, int status) {
        const int count = rows - width;
        if (group.rank == 0 && c0 == 0) task.status[t] = status;
        for (int c = 0; c < count; ++c) {
            double* w = in;  // free until the next row is fetched
            for (int j = group.rank; j < width; j += group.size) w[j] = lower[column_start(j, rows) + width + c - j];
            __syncthreads();
            for (int i = width - 1; good && i > 0; --i) {
                for (int j = group.rank; j < i; j += group.size) w[j] -= lower[column_start(j, rows) + i - j] * w[i];
                __syncthreads();
            }
            for (int j = constant + group.rank; j < width; j += group.size)
                task.weights[(t * p + j - constant) * task.r + c0 + c] = static_cast<T>(good ? w[j] : NAN);
            if (constant && group.rank == 0) {
                double intercept = w[0] + shift[width + c];
                for (int j = 1; j < width; ++j) intercept -= w[j] * shift[j];
                task.intercepts[t * task.r + c0 + c] = static_cast<T>(good ? intercept : NAN);
            }
            __syncthreads();
        }
    }

    __device__ void run() {
        find_shift();
        int64_t usable = 0;
        for (int64_t t = first - task.window + 1 > 0 ? first - task.window + 1 : 0; t <= first; ++t)
            usable += fetch(t, in);
        bool stale = true;
        int pivot = 0;
        for (int64_t t = first; t < first + task.segment && t < task.n; ++t) {
            if (t > first) {
                usable += fetch(t, in);
                usable -= fetch(t - task.window, out);
                if (!stale) stale = step();
            }
            const bool enough = usable >= task.min_periods;
            if (stale && enough) {
                pivot = rebuild(t);
                stale = pivot != 0;
            }
            output(t, enough && !stale, !enough ? -1 : stale ? refused_feature(pivot, constant) : 0);
        }
    }
};

// Grid: x segments, y slices of targets.
template <class T>
__global__ void __launch_bounds__(block_size) roll(RollingRidge<T> task) {
    PLATONIC_DYNAMIC_SHARED(double, memory);
    const int64_t segments = (task.n + task.segment - 1) / task.segment;
    for (int64_t c0 = static_cast<int64_t>(blockIdx.y) * right_slice; c0 < task.r;
         c0 += static_cast<int64_t>(gridDim.y) * right_slice) {
        const int count = static_cast<int>(task.r - c0 < right_slice ? task.r - c0 : right_slice);
        for (int64_t s = blockIdx.x; s < segments; s += gridDim.x)
            Segment<T>(task, memory, c0, count, s * task.segment).run();
    }
}

template <class T>
void roll_all(const RollingRidge<T>& task, const Launch& on) {
    if (task.n == 0) return;
    const DeviceGuard guard(on.device);
    const int width = static_cast<int>(task.p) + (task.intercepts != nullptr);
    const int slice = static_cast<int>(std::min<int64_t>(task.r, right_slice));
    const int64_t bytes = shared_values(width, width + slice) * static_cast<int64_t>(sizeof(double));
    const int64_t segments = (task.n + task.segment - 1) / task.segment;
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(segments, int64_t(1) << 20)),
                    static_cast<unsigned>(std::min<int64_t>((task.r + right_slice - 1) / right_slice, 65535)));
    const int threads = std::min((width + slice + warp_size - 1) / warp_size * warp_size, block_size);
    launch("rolling_ridge", roll<T>, {grid, threads, bytes}, on, task);
}

}  // namespace

namespace cuda {
void rolling_ridge(const RollingRidge<float>& task, const Launch& on) { roll_all(task, on); }
void rolling_ridge(const RollingRidge<double>& task, const Launch& on) { roll_all(task, on); }
}  // namespace cuda

}  // namespace platonic
