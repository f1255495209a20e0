// A tile of as many segments as a vector has lanes, stepped through time together.
//
// The factor is kept as unit lower triangle L and D in panels of panel_width columns, row after row within a panel, the
// targets as further rows (so that they hold D^-1 L^-1 C): the rank-one changes stream through the panels from left to
// right, applying the row that enters and the row that leaves in the same pass, panel_width columns a visit; the back
// substitution streams from right to left. The rank-one formulas are method C1 of Gill, Golub, Murray and Saunders,
// "Methods for modifying matrix factorizations", Math. Comp. 28 (1974), equation (5) ff.
#include "platonic/rolling_ridge_simd.h"

#include "platonic/lane_cholesky.h"
#include "platonic/lane_transpose.h"

namespace platonic {
namespace {

typedef vdouble vec;
constexpr int panel_width = tile_rows;
constexpr int64_t chunk_rows = 32;  // data rows held transposed while a Gram matrix is summed

// Where panel `q` of a factor of `rows` rows starts, in vectors.
PLATONIC_INLINE int64_t panel_start(int64_t q, int64_t rows) {
    return panel_width * (q * rows - panel_width * (q * (q - 1) / 2));
}

// Columns [c, c + M) of a panel: takes the row `in` up and the row `out` down.
struct UpdatePanel {
    double *panel, *in, *out, *diagonal;  // the latter three from column c on
    int64_t rows;                         // from row c on
    vec *alpha, *gamma;

    template <int M>
    void run() const {
        constexpr int n = lanes<double>;
        vec p[M], q[M], beta[M], delta[M], x[M], z[M];
#pragma GCC unroll 4
        for (int a = 0; a < M; ++a) {
            x[a] = load(in + a * n);
            z[a] = load(out + a * n);
        }
#pragma GCC unroll 4
        for (int b = 0; b < M; ++b) {
            p[b] = x[b];
            q[b] = z[b];
            const vec d = load(diagonal + b * n);
            const vec up = d + *alpha * p[b] * p[b];
            const vec per_up = 1.0 / up;
            beta[b] = *alpha * p[b] * per_up;
            *alpha *= d * per_up;
            const vec down = up + *gamma * q[b] * q[b];
            const vec per_down = 1.0 / down;
            delta[b] = *gamma * q[b] * per_down;
            *gamma *= up * per_down;
            store(diagonal + b * n, down);
#pragma GCC unroll 4
            for (int a = 0; a < M; ++a)
                if (a > b) change(panel + (a * M + b) * n, x[a], z[a], p[b], q[b], beta[b], delta[b]);
        }
        for (int64_t i = M; i < rows; ++i) {
            vec xi = load(in + i * n), zi = load(out + i * n);
#pragma GCC unroll 4
            for (int b = 0; b < M; ++b) change(panel + (i * M + b) * n, xi, zi, p[b], q[b], beta[b], delta[b]);
            store(in + i * n, xi);
            store(out + i * n, zi);
        }
    }

    static PLATONIC_INLINE void change(double* entry, vec& x, vec& z, vec p, vec q, vec beta, vec delta) {
        vec l = load(entry);
        x -= p * l;
        l += beta * x;
        z -= q * l;
        l += delta * z;
        store(entry, l);
    }
};

// Columns [c, c + M): unknowns from those behind them, for target row `target` (counted from row c).
struct SolvePanel {
    const double* panel;
    double* w;  // from unknown c on
    int64_t width, target;

    template <int M>
    void run() const {
        constexpr int n = lanes<double>;
        vec sums[M], more[M];
#pragma GCC unroll 4
        for (int b = 0; b < M; ++b) {
            sums[b] = load(panel + (target * M + b) * n);
            more[b] = vec{};
        }
        int64_t i = M;
        for (; i + 2 <= width; i += 2) {
            const vec even = load(w + i * n), odd = load(w + (i + 1) * n);
#pragma GCC unroll 4
            for (int b = 0; b < M; ++b) {
                sums[b] -= load(panel + (i * M + b) * n) * even;
                more[b] -= load(panel + ((i + 1) * M + b) * n) * odd;
            }
        }
        if (i < width) {
#pragma GCC unroll 4
            for (int b = 0; b < M; ++b) sums[b] -= load(panel + (i * M + b) * n) * load(w + i * n);
        }
#pragma GCC unroll 4
        for (int b = M - 1; b >= 0; --b) {
            sums[b] += more[b];
#pragma GCC unroll 4
            for (int a = 0; a < M; ++a)
                if (a > b) sums[b] -= load(panel + (a * M + b) * n) * sums[a];
            store(w + b * n, sums[b]);
        }
    }
};

// Scratch in vectors.
struct Layout {
    int64_t panels, diagonal, squares, peaks, shift, in, out, w, reorder, chunk, rows, end;
    Layout(int64_t width, int64_t r) {
        const int64_t features = width + r;
        panels = 0;
        diagonal = panels + panel_start(width / panel_width + 1, features) + panel_width * panel_width;
        squares = diagonal + width;
        peaks = squares + features;
        shift = peaks + features;
        in = shift + features;
        out = in + features;
        w = out + features;
        reorder = w + width * r + lanes<double>;
        chunk = reorder + width * r + lanes<double>;
        rows = chunk + features * chunk_rows;
        end = rows + row_start(features, width) + lanes<double>;
    }
};

template <class T>
struct Tile {
    static constexpr int n = lanes<double>;
    const RollingRidge<T>& task;
    int64_t constant, width, features, first;  // first: row of lane 0's segment
    double *panels, *diagonal, *squares, *peaks, *shift, *in, *out, *w, *reorder, *chunk, *rows;
    int64_t count[n] = {};  // usable rows in the window
    bool stale[n];          // the factor is not of this lane's window
    int32_t pivot[n] = {};  // refused pivot of the window that the factor was last built for

    Tile(const RollingRidge<T>& task, int64_t tile, double* scratch)
        : task(task),
          constant(task.intercepts != nullptr),
          width(task.p + constant),
          features(width + task.r),
          first(tile * n * task.segment) {
        const Layout at(width, task.r);
        panels = scratch + at.panels * n;
        diagonal = scratch + at.diagonal * n;
        squares = scratch + at.squares * n;
        peaks = scratch + at.peaks * n;
        shift = scratch + at.shift * n;
        in = scratch + at.in * n;
        out = scratch + at.out * n;
        w = scratch + at.w * n;
        reorder = scratch + at.reorder * n;
        chunk = scratch + at.chunk * n;
        rows = scratch + at.rows * n;
    }

    void run() {
        for (bool& s : stale) s = true;
        for (int64_t f = 0; f < features * n; ++f) shift[f] = 0;
        if (constant) {  // relative to the segment's first row, centring loses no more digits than the data's spread
            fetch(0, shift, 1, nullptr);
            for (int lane = 0; lane < n; ++lane) shift[lane] = 0;
        }
        count_first_windows();
        for (int64_t k = 0; k < task.segment && first + k < task.n; ++k) {
            if (k > 0) step(k);
            bool build = false;
            for (int lane = 0; lane < n; ++lane)
                build |= stale[lane] && row(lane, k) < task.n && count[lane] >= task.min_periods;
            if (build) rebuild(k);
            output(k);
        }
    }

    int64_t row(int lane, int64_t k) const { return first + lane * task.segment + k; }

    // Row k of every lane's segment (k may be negative) to features f at to + f * stride vectors. Unusable ones are 0,
    // also in the constant's place. used[lane] says which are usable.
    void fetch(int64_t k, double* to, int64_t stride, bool* used) const {
        const T *x[n], *y[n];
        bool exists[n];
        for (int lane = 0; lane < n; ++lane) {
            const int64_t t = row(lane, k);
            exists[lane] = t >= 0 && t < task.n;
            x[lane] = task.x + (exists[lane] ? t : 0) * task.p;
            y[lane] = task.y + (exists[lane] ? t : 0) * task.r;
        }
        vec good = vec{} + 1.0;  // 1, or 0 for lanes with something that is not finite
        fetch_part(x, task.p, to + constant * stride * n, stride, good);
        fetch_part(y, task.r, to + width * stride * n, stride, good);
        bool all = true;
        for (int lane = 0; lane < n; ++lane) {
            const bool usable = exists[lane] && good[lane] == 1.0;
            good[lane] = usable ? 1.0 : 0.0;
            all &= usable;
            if (used != nullptr) used[lane] = usable;
        }
        if (constant) store(to, good);
        if (constant && used != nullptr)
            for (int64_t f = 1; f < features; ++f)
                store(to + f * stride * n, load(to + f * stride * n) - load(shift + f * n));
        if (all) return;
        for (int64_t f = constant; f < features; ++f) {
            double* p = to + f * stride * n;
            store(p, good == 1.0 ? load(p) : vec{});
        }
    }

    static PLATONIC_INLINE void fetch_part(const T* const* arrays, int64_t size, double* to, int64_t stride,
                                           vec& good) {
        for (int64_t e = 0; e < size; e += group<double>) {
            vec values[group<double>];
            load_group<double>(values, Scattered<T>{arrays}, e, size - e);
#pragma GCC unroll 2
            for (int c = 0; c < group<double>; ++c) {
                if (e + c >= size) break;
                good = values[c] - values[c] == 0.0 ? good : vec{};
                store(to + (e + c) * stride * n, values[c]);
            }
        }
    }

    void count_first_windows() {
        const int64_t back = task.window < task.n ? task.window : task.n;
        for (int64_t k = 1 - back; k <= 0; ++k) {
            bool used[n];
            fetch(k, in, 1, used);
            for (int lane = 0; lane < n; ++lane) count[lane] += used[lane];
        }
    }

    // From window k - 1 to window k: rank-one changes of the factors and running sums of squares.
    void step(int64_t k) {
        bool entering[n], leaving[n];
        fetch(k, in, 1, entering);
        fetch(k - task.window, out, 1, leaving);
        bool live = false;
        for (int lane = 0; lane < n; ++lane) {
            count[lane] += entering[lane];
            count[lane] -= leaving[lane];
            live |= !stale[lane];
        }
        if (!live) return;
        vec trouble{};  // not 0: build anew
        for (int64_t f = 0; f < features; ++f) {
            const vec x = load(in + f * n), z = load(out + f * n);
            const vec now = load(squares + f * n) + x * x - z * z;
            const vec peak = max(load(peaks + f * n), now);
            store(squares + f * n, now);
            store(peaks + f * n, peak);
            trouble = now < smallest_remainder * peak ? trouble + 1.0 : trouble;
        }
        vec alpha = vec{} + 1.0, gamma = vec{} - 1.0;
        for (int64_t c = 0; c < width; c += panel_width) {
            const UpdatePanel panel{panels + panel_start(c / panel_width, features) * n,
                                    in + c * n,
                                    out + c * n,
                                    diagonal + c * n,
                                    features - c,
                                    &alpha,
                                    &gamma};
            with_constant(width - c < panel_width ? width - c : panel_width, panel);
        }
        const double kept = task.tolerance > smallest_kept_pivot ? task.tolerance : smallest_kept_pivot;
        for (int64_t j = 0; j < width; ++j) {
            const vec d = load(diagonal + j * n), g = load(squares + j * n) + (j < constant ? 0.0 : task.l2);
            trouble = d > max(g * kept, vec{}) ? trouble : trouble + 1.0;  // NaN: trouble
        }
        trouble = (gamma < 0.0) & (gamma > -largest_downdate) ? trouble : trouble + 1.0;
        for (int lane = 0; lane < n; ++lane) stale[lane] |= trouble[lane] != 0.0;
    }

    // Gram matrices and factors of the windows that end at row k of every lane's segment.
    void rebuild(int64_t k) {
        for (int64_t i = 0; i < row_start(features, width) * n; ++i) rows[i] = 0;
        for (int64_t f = 0; f < features * n; ++f) squares[f] = 0;
        const int64_t back = task.window < task.n ? task.window : task.n;
        for (int64_t start = k + 1 - back; start <= k; start += chunk_rows) {
            const int64_t here = k + 1 - start < chunk_rows ? k + 1 - start : chunk_rows;
            bool used[n];
            for (int64_t i = 0; i < here; ++i) fetch(start + i, chunk + i * n, chunk_rows, used);
            add_gram(chunk, chunk_rows, here, rows, width, features);
            for (int64_t f = width; f < features; ++f)
                for (int64_t i = 0; i < here; ++i) {
                    const vec v = load(chunk + (f * chunk_rows + i) * n);
                    store(squares + f * n, load(squares + f * n) + v * v);
                }
        }
        for (int64_t j = 0; j < width; ++j) store(squares + j * n, load(rows + (row_start(j, width) + j) * n));
        for (int64_t f = 0; f < features * n; ++f) peaks[f] = squares[f];
        Factoring<double> f{rows, rows, width, features, constant, task.l2, task.tolerance, {}};
        factor_rows(f);
        for (int lane = 0; lane < n; ++lane) {
            pivot[lane] = static_cast<int32_t>(f.status[lane]);
            stale[lane] = pivot[lane] != 0;
        }
        for (int64_t c = 0; c < width; c += panel_width) {
            const int64_t m = width - c < panel_width ? width - c : panel_width;
            double* panel = panels + panel_start(c / panel_width, features) * n;
            for (int64_t b = 0; b < m; ++b) {
                const vec reciprocal = load(rows + (row_start(c + b, width) + c + b) * n);
                store(diagonal + (c + b) * n, 1.0 / (reciprocal * reciprocal));
                for (int64_t i = c + b + 1; i < features; ++i)
                    store(panel + ((i - c) * m + b) * n, reciprocal * load(rows + (row_start(i, width) + c + b) * n));
            }
        }
    }

    void output(int64_t k) {
        int used = 0;
        bool any = false;
        vec good{};
        for (; used < n && row(used, k) < task.n; ++used) {
            const bool enough = count[used] >= task.min_periods, ok = enough && !stale[used];
            const int32_t offset = static_cast<int32_t>(constant);
            const int32_t feature = pivot[used] > offset + 1 ? pivot[used] - offset : 1;
            task.status[row(used, k)] = ok ? 0 : enough ? feature : -1;
            good[used] = ok;
            any |= ok;
        }
        for (int64_t c = 0; c < task.r; ++c) {
            if (any) solve(c);
            for (int64_t j = 0; j < width; ++j) {
                double* entry = w + (c * width + j) * n;
                store(entry, good == 1.0 ? load(entry) : splat(__builtin_nan("")));
            }
        }
        T* arrays[n];
        for (int lane = 0; lane < used; ++lane) arrays[lane] = task.weights + row(lane, k) * task.p * task.r;
        const double* ordered = w + constant * n;
        if (task.r > 1) {
            for (int64_t j = 0; j < task.p; ++j)
                for (int64_t c = 0; c < task.r; ++c)
                    store(reorder + (j * task.r + c) * n, load(w + (c * width + constant + j) * n));
            ordered = reorder;
        }
        store_lanes<double>(arrays, 0, ordered, task.p * task.r, used);
        for (int64_t c = 0; constant && c < task.r; ++c) {
            const double* of = w + c * width * n;
            vec b = load(of) + load(shift + (width + c) * n);
            for (int64_t j = 1; j < width; ++j) b -= load(of + j * n) * load(shift + j * n);
            for (int lane = 0; lane < used; ++lane)
                task.intercepts[row(lane, k) * task.r + c] = static_cast<T>(b[lane]);
        }
    }

    void solve(int64_t c) {
        for (int64_t q = (width - 1) / panel_width; q >= 0; --q) {
            const int64_t column = q * panel_width, left = width - column;
            const SolvePanel panel{panels + panel_start(q, features) * n, w + (c * width + column) * n, left, left + c};
            with_constant(left < panel_width ? left : panel_width, panel);
        }
    }
};

}  // namespace

namespace PLATONIC_ISA {

int rolling_lanes() { return lanes<double>; }

int64_t rolling_scratch(int64_t p, int64_t r, bool constant) {
    return Layout(p + constant, r).end * PLATONIC_VECTOR_BYTES;
}

void rolling_tile(const RollingRidge<float>& task, int64_t tile, void* scratch) {
    Tile<float>(task, tile, static_cast<double*>(scratch)).run();
}
void rolling_tile(const RollingRidge<double>& task, int64_t tile, void* scratch) {
    Tile<double>(task, tile, static_cast<double*>(scratch)).run();
}

}  // namespace PLATONIC_ISA
}  // namespace platonic
