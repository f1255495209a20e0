// A segment of rows goes through a panel of gram_block_rows rows of v = [z | y], row-major in L2: build it (copy,
// standardise, or multiply by the layer's weights), subtract the shift and scale each row by the square root of its
// weight, then add panel^T panel to the moments, tile by tile of the lower triangle. A tile of tile_rows x 2 vectors
// stays in registers while the panel's rows stream past it: each row costs two vector loads and a broadcast per
// tile row, and needs no transposed copy.
#include "platonic/gram_simd.h"

#include "common/simd_math.h"

namespace platonic {
namespace PLATONIC_ISA {
namespace {

// Accumulators (tile_rows x 2) leave room for two operands and a broadcast.
constexpr int tile_rows = vector_registers >= 32 ? 8 : 4;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// At least n elements of `bytes` bytes, padded to an odd number of 64-byte lines.
int64_t odd_line_stride(int64_t n, int64_t bytes) {
    const int64_t lines = round_up(n * bytes, 64) / 64;
    return (lines | 1) * 64 / bytes;
}

// acc[v] += left * right[v].
template <class T, int V>
PLATONIC_INLINE void multiply_add(vec_t<T> (&acc)[V], T left, const vec_t<T> (&right)[V]) {
    const vec_t<T> broadcast = splat<T>(left);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[v] += broadcast * right[v];
}

// Rows of x that the next panel will read, one cache line a row of each tile: fetching them while tiles are summed
// hides the memory behind the arithmetic.
template <class T>
struct Ahead {
    const T* next;
    int64_t stride, columns;
};

// A block of panel rows and where its products go.
template <class T>
struct Syrk {
    const T* panel;
    int64_t stride, rows;
    double* moments;
    int64_t moment_stride;
    Ahead<T> ahead;
};

// moments[i0 .. + R][j0 .. + V vectors] += panel[:, i]^T panel[:, j] over the block's rows.
template <class T, int R, int V>
__attribute__((noinline)) void syrk_tile(Syrk<T>& s, int64_t i0, int64_t j0) {
    vec_t<T> acc[R][V] = {};
    const T* left = s.panel + i0;
    const T* right = s.panel + j0;
    const bool fetch = s.ahead.columns > 0;
    const T* ahead = fetch ? s.ahead.next : left;
    const int64_t ahead_stride = fetch ? s.ahead.stride : s.stride;
    s.ahead.next += 64 / sizeof(T);
    s.ahead.columns -= 64 / sizeof(T);
    for (int64_t r = 0; r < s.rows; ++r, left += s.stride, right += s.stride, ahead += ahead_stride) {
        __builtin_prefetch(ahead, 0, 2);
        vec_t<T> b[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) b[v] = load(right + v * lanes<T>);
#pragma GCC unroll 16
        for (int a = 0; a < R; ++a) multiply_add<T, V>(acc[a], left[a], b);
    }
#pragma GCC unroll 16
    for (int a = 0; a < R; ++a) {
        T sums[V * lanes<T>];
        for (int v = 0; v < V; ++v) store(sums + v * lanes<T>, acc[a][v]);
        double* out = s.moments + (i0 + a) * s.moment_stride + j0;
        for (int c = 0; c < V * lanes<T>; ++c) out[c] += sums[c];
    }
}

// The tiles of panel^T panel that touch the lower triangle. The rows of a strip's first vector need that vector
// alone: one tile as high as a vector is wide.
template <class T>
void add_moments(Syrk<T> s, int64_t p) {
    constexpr int L = lanes<T>, high = L < tile_rows ? tile_rows : L;
    for (int64_t j0 = 0; j0 < p; j0 += 2 * L) {
        int64_t i0 = j0;
        if (L >= tile_rows || j0 + L >= p) {
            syrk_tile<T, high, 1>(s, i0, j0);
            i0 += high;
        }
        for (; i0 < p; i0 += tile_rows) syrk_tile<T, tile_rows, 2>(s, i0, j0);
    }
}

// panel[r0 .. + tile_rows][j0 .. + 2 vectors] = act(x W + b). Rows past the block repeat its last one.
template <class T>
void layer_tile(const GramArgs& args, const GramLayout& layout, const GramWorkspace& work, const T* x, int64_t x_stride,
                int64_t rows, int64_t r0, int64_t j0) {
    constexpr int64_t L = lanes<T>;
    const T* source[tile_rows];
    for (int a = 0; a < tile_rows; ++a) source[a] = x + (r0 + a < rows ? r0 + a : rows - 1) * x_stride;
    const T* right = static_cast<const T*>(work.weight) + j0;
    const T* bias = static_cast<const T*>(work.bias) + j0;
    vec_t<T> acc[tile_rows][2];
    for (int a = 0; a < tile_rows; ++a) acc[a][0] = load(bias), acc[a][1] = load(bias + L);
    for (int64_t i = 0; i < args.columns; ++i, right += layout.weight_stride) {
        const vec_t<T> b[2] = {load(right), load(right + L)};
#pragma GCC unroll 8
        for (int a = 0; a < tile_rows; ++a) multiply_add<T, 2>(acc[a], source[a][i], b);
    }
    const Activation kind = static_cast<Activation>(args.activation);
    T* out = static_cast<T*>(work.panel) + r0 * layout.panel_stride + j0;
    for (int a = 0; a < tile_rows; ++a)
        for (int v = 0; v < 2; ++v) store(out + a * layout.panel_stride + v * L, activate_lanes<T>(kind, acc[a][v]));
}

// to [rows, n] = (from - mean) * factor, or a copy; padded to whole vectors with zeros.
template <class T, bool standardise>
void copy_rows(const T* from, int64_t from_stride, const T* mean, const T* factor, int64_t n, int64_t rows, T* to,
               int64_t to_stride) {
    constexpr int64_t L = lanes<T>;
    const int64_t whole = n / L * L, rest = n - whole;
    for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride) {
        for (int64_t c = 0; c < whole; c += L) {
            const vec_t<T> v = load(from + c);
            store(to + c, standardise ? (v - load(mean + c)) * load(factor + c) : v);
        }
        if (rest == 0) continue;
        const vec_t<T> v = load_some(from + whole, rest);
        store(to + whole, standardise ? (v - load_some(mean + whole, rest)) * load_some(factor + whole, rest) : v);
    }
}

// panel[r] = v of row first + r; z is written out where asked.
template <class T>
void build_panel(const GramArgs& args, const GramLayout& layout, const GramWorkspace& work, int64_t first,
                 int64_t rows) {
    const T* x = static_cast<const T*>(args.x) + first * args.row_stride;
    const T* mean = static_cast<const T*>(args.x_mean);
    const T* factor = static_cast<const T*>(args.x_factor);
    T* panel = static_cast<T*>(work.panel);
    if (args.weight == nullptr) {
        (mean == nullptr ? copy_rows<T, false> : copy_rows<T, true>)(x, args.row_stride, mean, factor, args.columns,
                                                                     rows, panel, layout.panel_stride);
    } else {
        int64_t x_stride = args.row_stride;
        if (mean != nullptr) {
            T* input = static_cast<T*>(work.input);
            copy_rows<T, true>(x, x_stride, mean, factor, args.columns, rows, input, layout.input_stride);
            x = input;
            x_stride = layout.input_stride;
        }
        for (int64_t j0 = 0; j0 < args.width; j0 += 2 * lanes<T>)
            for (int64_t r0 = 0; r0 < rows; r0 += tile_rows)
                layer_tile<T>(args, layout, work, x, x_stride, rows, r0, j0);
    }
    if (args.z != nullptr)
        for (int64_t r = 0; r < rows; ++r)
            std::memcpy(static_cast<T*>(args.z) + (first + r) * args.width, panel + r * layout.panel_stride,
                        args.width * sizeof(T));
    const T* y = static_cast<const T*>(args.y) + first * args.targets;
    for (int64_t r = 0; r < (args.targets > 0 ? rows : 0); ++r)
        for (int64_t c = 0; c < args.targets; ++c) panel[r * layout.panel_stride + args.width + c] = *y++;
}

// root[r] = sqrt(w); total += sum of w.
template <class T>
void take_roots(const GramArgs& args, GramWorkspace& work, int64_t first, int64_t rows) {
    if (args.row_weight == nullptr) {
        work.total += static_cast<double>(rows);
        return;
    }
    T* root = static_cast<T*>(work.root);
    const T* weight = static_cast<const T*>(args.row_weight) + first;
    for (int64_t r = 0; r < rows; ++r) {
        root[r] = static_cast<T>(__builtin_sqrt(static_cast<double>(weight[r])));
        work.total += static_cast<double>(weight[r]);
    }
}

// The shift of a segment: the plain mean of its first block, rounded to T.
template <class T>
void choose_shift(const GramLayout& layout, const GramWorkspace& work, int64_t rows, int64_t p) {
    const T* panel = static_cast<const T*>(work.panel);
    T* shift = static_cast<T*>(work.shift);
    for (int64_t c = 0; c < p; ++c) work.sums[c] = 0;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < p; ++c) work.sums[c] += panel[r * layout.panel_stride + c];
    for (int64_t c = 0; c < p; ++c) {
        shift[c] = static_cast<T>(work.sums[c] / static_cast<double>(rows));
        work.sums[c] = 0;
    }
}

// One vector of columns of one row: v = (v - shift) * root in place; returns its part of the sums.
template <class T, bool weighted>
PLATONIC_INLINE vec_t<T> shift_vector(T* at, vec_t<T> shift, const T* root) {
    vec_t<T> v = load(at) - shift;
    if (weighted) v *= splat<T>(*root);
    store(at, v);
    return weighted ? v * splat<T>(*root) : v;
}

// panel = (panel - shift) * root; sums += root * panel. Four partial sums hide the latency of the addition.
template <class T, bool weighted>
void shift_panel(const GramLayout& layout, const GramWorkspace& work, int64_t rows, int64_t p) {
    constexpr int64_t L = lanes<T>;
    const int64_t stride = layout.panel_stride;
    for (int64_t c = 0; c < p; c += L) {
        T* at = static_cast<T*>(work.panel) + c;
        const T* root = static_cast<const T*>(work.root);
        const vec_t<T> shift = load(static_cast<const T*>(work.shift) + c);
        vec_t<T> partial[4] = {};
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4, at += 4 * stride, root += 4)
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) partial[k] += shift_vector<T, weighted>(at + k * stride, shift, root + k);
        for (; r < rows; ++r, at += stride, ++root) partial[0] += shift_vector<T, weighted>(at, shift, root);
        const vec_t<T> total = (partial[0] + partial[1]) + (partial[2] + partial[3]);
        for (int64_t i = 0; i < L; ++i) work.sums[c + i] += total[i];
    }
}

template <class T>
void run_segment(const GramArgs& args, const GramLayout& layout, GramWorkspace& work, int64_t first, int64_t rows) {
    const int64_t p = args.width + args.targets;
    std::memset(work.moments, 0, layout.moment_rows * layout.moment_stride * sizeof(double));
    work.total = 0;
    for (int64_t done = 0; done < rows; done += gram_block_rows) {
        const int64_t block = rows - done < gram_block_rows ? rows - done : gram_block_rows;
        build_panel<T>(args, layout, work, first + done, block);
        take_roots<T>(args, work, first + done, block);
        if (done == 0) choose_shift<T>(layout, work, block, p);
        if (args.row_weight == nullptr)
            shift_panel<T, false>(layout, work, block, p);
        else
            shift_panel<T, true>(layout, work, block, p);
        const int64_t next = done + block;
        Ahead<T> ahead = {static_cast<const T*>(args.x) + (first + next) * args.row_stride, args.row_stride, 0};
        if (next < rows) ahead.columns = args.columns;
        add_moments<T>(
            {static_cast<const T*>(work.panel), layout.panel_stride, block, work.moments, layout.moment_stride, ahead},
            p);
    }
}

}  // namespace

GramLayout gram_layout(const GramArgs& args) {
    const int64_t bytes = args.is_double ? 8 : 4;
    const int64_t tile = 2 * PLATONIC_VECTOR_BYTES / bytes;
    const int64_t p = round_up(args.width + args.targets, tile);
    GramLayout layout = {};
    layout.panel_stride = odd_line_stride(p, bytes);
    if (args.weight != nullptr) {
        layout.weight_stride = odd_line_stride(round_up(args.width, tile), bytes);
        if (args.x_mean != nullptr) layout.input_stride = odd_line_stride(round_up(args.columns, tile), bytes);
    }
    layout.moment_stride = p;
    layout.moment_rows = p;
    return layout;
}

void gram_segment(const GramArgs& args, const GramLayout& layout, GramWorkspace& work, int64_t first, int64_t rows) {
    if (args.is_double)
        run_segment<double>(args, layout, work, first, rows);
    else
        run_segment<float>(args, layout, work, first, rows);
}

}  // namespace PLATONIC_ISA
}  // namespace platonic
