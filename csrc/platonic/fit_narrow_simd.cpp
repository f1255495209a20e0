// The sweep of fit_narrow over the rows, and its small-matrix side, compiled per instruction set.
//
// A panel of one try goes through three passes that leave it in the first-level cache: the products Z W with 4
// columns x 4 (2) vectors of rows in registers, the activation, and the sums with 4 x 4 (4 x 2) pairs of columns in
// registers. Sums stay vectors (one lane, every so manieth row) over a chunk of panels and are folded once after it.
#include "platonic/fit_narrow_simd.h"

#include "common/simd.h"
#include "common/simd_math.h"

namespace platonic {
namespace PLATONIC_ISA {
namespace {

constexpr int L = lanes<double>;
constexpr int tile = 4;                                     // columns of a register tile
constexpr int tile_right = vector_registers >= 32 ? 4 : 2;  // columns, or row vectors, on its other side
constexpr int strip = tile_right * L;                       // rows of a strip
static_assert(narrow_panel % strip == 0 && narrow_pilot % strip == 0, "panels are whole strips");

// ---- Z W + b ----

// NJ columns of out, all strips; `stride` doubles between columns of z and of out.
template <int NJ>
PLATONIC_INLINE void apply_columns(const NarrowMap& map, int j, int rows, int stride, const double* __restrict__ z,
                                   double* __restrict__ out) {
    for (int r = 0; r < rows; r += strip) {
        vdouble sum[NJ][tile_right];
        for (int a = 0; a < NJ; ++a)
            for (int b = 0; b < tile_right; ++b) sum[a][b] = splat<double>(map.bias[j + a]);
        const double* w = map.weights + j;
        const double* column = z + r;
        for (int i = 0; i < map.h_in; ++i, w += map.h_out, column += stride) {
            vdouble value[tile_right];
            for (int b = 0; b < tile_right; ++b) value[b] = load(column + b * L);
            for (int a = 0; a < NJ; ++a) {
                const vdouble weight = splat<double>(w[a]);
                for (int b = 0; b < tile_right; ++b) sum[a][b] += weight * value[b];
            }
        }
        for (int a = 0; a < NJ; ++a)
            for (int b = 0; b < tile_right; ++b) store(out + (j + a) * stride + r + b * L, sum[a][b]);
    }
}

void apply_linear(const NarrowMap& map, int rows, int stride, const double* z, double* out) {
    int j = 0;
    for (; j + tile <= map.h_out; j += tile) apply_columns<tile>(map, j, rows, stride, z, out);
    switch (map.h_out - j) {
        case 3:
            apply_columns<3>(map, j, rows, stride, z, out);
            break;
        case 2:
            apply_columns<2>(map, j, rows, stride, z, out);
            break;
        case 1:
            apply_columns<1>(map, j, rows, stride, z, out);
            break;
    }
}

// out = act(u) - shift by columns; out may be u. Strips beyond the first `rows` rows are not touched, and rows of the
// last strip beyond them become 0.
template <Activation kind>
PLATONIC_INLINE void activate_columns(const NarrowMap& map, int rows, int stride, const double* u, double* out) {
    for (int j = 0; j < map.h_out; ++j) {
        const vdouble shift = splat<double>(map.shift[j]);
        const double* from = u + j * stride;
        double* to = out + j * stride;
        int r = 0;
        for (; r < rows; r += strip) {
            vdouble value[tile_right];
            for (int b = 0; b < tile_right; ++b) value[b] = activate_as<kind, double>(load(from + r + b * L)) - shift;
            for (int b = 0; b < tile_right; ++b) store(to + r + b * L, value[b]);
        }
        for (int tail = rows; tail < r; ++tail) to[tail] = 0.0;
    }
}

void activate(const NarrowMap& map, int rows, int stride, const double* u, double* out) {
    switch (map.activation) {
        case Activation::relu:
            return activate_columns<Activation::relu>(map, rows, stride, u, out);
        case Activation::abs:
            return activate_columns<Activation::abs>(map, rows, stride, u, out);
        case Activation::tanh:
            return activate_columns<Activation::tanh>(map, rows, stride, u, out);
        case Activation::celu:
            return activate_columns<Activation::celu>(map, rows, stride, u, out);
        default:
            return activate_columns<Activation::identity>(map, rows, stride, u, out);
    }
}

// ---- sums over rows of products of columns ----

// sum[i][j] += rows of a_i * b_j for NA columns of a and NB of b. Triangle: only j >= i.
template <int NA, int NB, bool triangle>
PLATONIC_INLINE void add_products(const double* a, const double* b, int rows, double* sums, int64_t ld) {
    vdouble sum[NA][NB];
    for (int i = 0; i < NA; ++i)
        for (int j = triangle ? i : 0; j < NB; ++j) sum[i][j] = load(sums + (i * ld + j) * L);
    for (int r = 0; r < rows; r += L) {
        vdouble right[NB];
        for (int j = 0; j < NB; ++j) right[j] = load(b + j * narrow_panel + r);
        for (int i = 0; i < NA; ++i) {
            const vdouble left = load(a + i * narrow_panel + r);
            for (int j = triangle ? i : 0; j < NB; ++j) sum[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < NA; ++i)
        for (int j = triangle ? i : 0; j < NB; ++j) store(sums + (i * ld + j) * L, sum[i][j]);
}

// NA columns of a with `count` columns of b.
template <int NA>
PLATONIC_INLINE void add_row(const double* a, const double* b, int count, int rows, double* sums, int64_t ld) {
    int j = 0;
    for (; j + tile_right <= count; j += tile_right)
        add_products<NA, tile_right, false>(a, b + j * narrow_panel, rows, sums + j * L, ld);
    switch (count - j) {
        case 3:
            add_products<NA, 3, false>(a, b + j * narrow_panel, rows, sums + j * L, ld);
            break;
        case 2:
            add_products<NA, 2, false>(a, b + j * narrow_panel, rows, sums + j * L, ld);
            break;
        case 1:
            add_products<NA, 1, false>(a, b + j * narrow_panel, rows, sums + j * L, ld);
            break;
    }
}

// The rows of sums that belong to the NA columns from i on; wz is z times the weights.
template <int NA>
PLATONIC_INLINE void add_block(int i, int h, int targets_count, int rows, const double* z, const double* wz,
                               const double* targets, double* sums) {
    const int64_t ld = h + targets_count;
    double* row = sums + i * ld * L;
    const int after = i + NA;
    add_products<NA, NA, true>(wz + i * narrow_panel, z + i * narrow_panel, rows, row + i * L, ld);
    add_row<NA>(wz + i * narrow_panel, z + after * narrow_panel, h - after, rows, row + after * L, ld);
    add_row<NA>(z + i * narrow_panel, targets, targets_count, rows, row + h * L, ld);
}

void add_panel(int h, int k, int rows, const double* z, const double* wz, const double* targets, double* sums) {
    int i = 0;
    for (; i + tile <= h; i += tile) add_block<tile>(i, h, k + 1, rows, z, wz, targets, sums);
    switch (h - i) {
        case 3:
            add_block<3>(i, h, k + 1, rows, z, wz, targets, sums);
            break;
        case 2:
            add_block<2>(i, h, k + 1, rows, z, wz, targets, sums);
            break;
        case 1:
            add_block<1>(i, h, k + 1, rows, z, wz, targets, sums);
            break;
    }
}

// Rows with weights: out = w * z.
void weigh_panel(int h, int rows, const double* z, const double* w, double* out) {
    for (int j = 0; j < h; ++j)
        for (int r = 0; r < rows; r += L)
            store(out + j * narrow_panel + r, load(z + j * narrow_panel + r) * load(w + r));
}

// horizontal_sum goes lane by lane; here halves are added, with constant shuffles.
PLATONIC_INLINE double sum_of_lanes(vdouble v) {
#if PLATONIC_VECTOR_BYTES == 64
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    return v[0] + v[1];
#elif PLATONIC_VECTOR_BYTES == 32
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
    return v[0] + v[1];
#else
    return v[0] + v[1];
#endif
}

// Folds lane sums into sums, and clears them for the next chunk.
void fold(int h, int k, double* lane_sums, double* sums) {
    const int ld = h + 1 + k;
    for (int i = 0; i < h; ++i)
        for (int j = i; j < ld; ++j) {
            double* p = lane_sums + (i * ld + j) * L;
            vdouble v = load(p);
            store(p, vdouble{});
            sums[i * ld + j] += sum_of_lanes(v);
        }
}

// ---- one try over a chunk of panels ----

struct Workspace {
    double *lane_sums, *mapped, *weighed;
};

void sweep_chunk(const NarrowSweep& s, const NarrowMap* map, int64_t first, int64_t last, const Workspace& work,
                 double* sums) {
    const int h = map == nullptr ? s.width : map->h_out;
    for (int64_t p = first; p < last; ++p) {
        const int64_t left = s.m - p * narrow_panel;
        const int rows = static_cast<int>(left < narrow_panel ? left : narrow_panel);
        double* panel = s.z + p * s.panel_stride;
        double* z = panel;
        if (map != nullptr) {
            apply_linear(*map, rows, narrow_panel, panel, work.mapped);
            z = s.keep ? panel : work.mapped;
            activate(*map, rows, narrow_panel, work.mapped, z);
        }
        const double* targets = s.targets + p * (s.k + 1) * narrow_panel;
        const double* wz = z;
        if (s.weighted) {
            weigh_panel(h, rows, z, targets, work.weighed);
            wz = work.weighed;
        }
        add_panel(h, s.k, rows, z, wz, targets, work.lane_sums);
    }
    fold(h, s.k, work.lane_sums, sums);
}

void advance_chunk(const NarrowSweep& s, int64_t first, int64_t last, double* mapped) {
    for (int64_t p = first; p < last; ++p) {
        const int64_t left = s.m - p * narrow_panel;
        const int rows = static_cast<int>(left < narrow_panel ? left : narrow_panel);
        double* panel = s.z + p * s.panel_stride;
        apply_linear(*s.advance, rows, narrow_panel, panel, mapped);
        activate(*s.advance, rows, narrow_panel, mapped, panel);
    }
}

}  // namespace

int64_t narrow_sweep_work(int64_t h, int64_t k) { return narrow::sums_size(h, k) * L + 2 * h * narrow_panel; }

void narrow_sweep(const NarrowSweep& s, int64_t first, int64_t last, double* sums, double* work) {
    const int h = s.n_tries > 0 ? s.tries[0].h_out : s.width;
    const int64_t size = narrow::sums_size(h, s.k), tries = s.n_tries > 0 ? s.n_tries : 1;
    const int64_t wide = s.advance != nullptr && s.advance->h_out > h ? s.advance->h_out : h;
    const Workspace parts{work, work + size * L, work + size * L + wide * narrow_panel};
    for (int64_t i = 0; i < size * L; ++i) parts.lane_sums[i] = 0.0;
    for (int64_t i = 0; i < size * tries; ++i) sums[i] = 0.0;
    for (int64_t p = first; p < last; p += narrow_chunk) {
        const int64_t end = p + narrow_chunk < last ? p + narrow_chunk : last;
        if (s.advance != nullptr) advance_chunk(s, p, end, parts.mapped);
        for (int64_t t = 0; t < tries; ++t)
            sweep_chunk(s, s.n_tries > 0 ? s.tries + t : nullptr, p, end, parts, sums + t * size);
    }
}

void narrow_advance(const NarrowSweep& s, int64_t first, int64_t last, double* work) {
    advance_chunk(s, first, last, work);
}

void narrow_advance_pilot(const NarrowMap& map, int64_t rows, const double* z, double* out, double* shift) {
    double zeros[narrow_max_width] = {};
    NarrowMap unshifted = map;
    unshifted.shift = zeros;
    const int count = static_cast<int>(rows);
    apply_linear(unshifted, count, narrow_pilot, z, out);
    activate(unshifted, count, narrow_pilot, out, out);
    for (int j = 0; j < map.h_out; ++j) {
        double total = 0.0;
        for (int r = 0; r < count; ++r) total += out[j * narrow_pilot + r];
        shift[j] = total / static_cast<double>(rows);
        for (int r = 0; r < count; ++r) out[j * narrow_pilot + r] -= shift[j];
    }
}

void narrow_solve(int h, int k, const double* sums, const double* shift, double weight_sum, double y_square,
                  const NarrowRule& rule, const narrow::Stats& stats, double* work) {
    narrow::solve_readout(narrow::OneThread{}, h, k, sums, shift, weight_sum, y_square, rule, stats, work);
}

void narrow_form(int h, int k, int n, const NarrowRule& rule, const narrow::Stats& stats, const double* y_mean,
                 double weight_sum, const double* normals, const double* shift_in, const narrow::Candidate& out,
                 double* work) {
    narrow::form_candidate(narrow::OneThread{}, h, k, n, rule, stats, y_mean, weight_sum, normals, out, work);
    narrow::shift_bias(narrow::OneThread{}, h, n, shift_in, out);
}

}  // namespace PLATONIC_ISA
}  // namespace platonic
