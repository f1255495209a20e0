// A tile of as many systems as a vector has lanes: in through transposes, Gram (from data), factor and solution for
// every l2, out through transposes. See lane_cholesky.h for the layout.
#include "platonic/batched_ridge_simd.h"

#include "platonic/lane_cholesky.h"
#include "platonic/lane_transpose.h"

namespace platonic {
namespace {

// Where lane's arrays start. Lanes beyond the last system repeat it: they are computed and not stored.
template <class T>
PLATONIC_INLINE void lane_pointers(T** pointers, T* base, int64_t stride, int64_t first, int64_t batch, int count) {
    T* p = base + first * stride;
    for (int lane = 0; lane < count; ++lane) {
        pointers[lane] = p;
        if (first + lane + 1 < batch) p += stride;
    }
}

// Scratch of a tile, in vectors: the rows of [G; C'], of its factor (apart from the former only when a grid of l2
// needs them again), and room to turn [p, r] into rows.
template <class T>
struct Layout {
    int64_t rows, factor, reorder, data, end;
    Layout(int64_t width, int64_t r, int64_t grid, int64_t data_vectors) {
        const int64_t size = row_start(width + r, width) + lanes<T>;
        rows = 0;
        factor = grid > 1 ? size : 0;
        reorder = factor + size;
        data = reorder + width * r + 2 * lanes<T>;
        end = data + data_vectors;
    }
};

// Factors and solves for l2 number `l`, and stores weights (without the first `unpenalised` unknowns) and status.
template <class T, class Out>
struct Solver {
    T* scratch;
    Layout<T> at;
    int64_t width, r, grid, unpenalised, first, batch;
    T tolerance;
    Out* weights;
    int32_t* status;

    int used() const { return batch - first < lanes<T> ? static_cast<int>(batch - first) : lanes<T>; }
    T* right(int64_t c) const { return scratch + (at.factor + row_start(width + c, width)) * lanes<T>; }

    void solve(T l2, int64_t l) const {
        Factoring<T> f{scratch, scratch + at.factor * lanes<T>, width, width + r, unpenalised, l2, tolerance, {}};
        factor_rows(f);
        for (int64_t c = 0; c < r; ++c) substitute_back(f.to, width, right(c));
        store_status(f.status, l);
        const int64_t p = width - unpenalised;
        Out* arrays[lanes<T>];
        lane_pointers(arrays, weights + l * p * r, grid * p * r, first, batch, lanes<T>);
        const T* ordered = right(0) + unpenalised * lanes<T>;
        if (r > 1) {
            T* to = scratch + at.reorder * lanes<T>;
            for (int64_t i = 0; i < p; ++i)
                for (int64_t c = 0; c < r; ++c)
                    store(to + (i * r + c) * lanes<T>, load(right(c) + (unpenalised + i) * lanes<T>));
            ordered = to;
        }
        store_lanes<T>(arrays, 0, ordered, p * r, used());
    }

    // Writes which feature's pivot was refused, and NaN to the weights of the lanes that have one.
    void store_status(const typename Simd<T>::ivec& pivots, int64_t l) const {
        int64_t words[PLATONIC_VECTOR_BYTES / 8], any = 0;
        __builtin_memcpy(words, &pivots, sizeof words);
        for (int64_t word : words) any |= word;
        for (int lane = 0; lane < used(); ++lane) status[(first + lane) * grid + l] = 0;
        if (any == 0) return;
        for (int lane = 0; lane < used(); ++lane) {
            const int32_t pivot = static_cast<int32_t>(pivots[lane]), constant = static_cast<int32_t>(unpenalised);
            status[(first + lane) * grid + l] = pivot > constant + 1 ? pivot - constant : pivot != 0;
        }
        const T nan = sizeof(T) == 4 ? (T)__builtin_nanf("") : (T)__builtin_nan("");
        for (int64_t e = 0; e < width * r; ++e) {
            T* w = right(0) + e * lanes<T>;
            store(w, pivots == 0 ? load(w) : splat(nan));
        }
    }
};

// P: p where it is known at compile time, else 0.
template <int P, class T, class Arrays>
PLATONIC_INLINE void load_lower(T* rows, Arrays gram, int64_t width) {
    const int64_t p = P > 0 ? P : width;
    for (int64_t i = 0; i < p; ++i) load_lanes<T>(rows + row_start(i, p) * lanes<T>, gram, i * p, i + 1, p * p - i * p);
}

template <class T, class Arrays>
PLATONIC_INLINE void load_right(T* rows, Arrays right, int64_t p, int64_t r, T* reorder) {
    if (r == 1) return load_lanes<T>(rows, right, 0, p, p);
    load_lanes<T>(reorder, right, 0, p * r, p * r);
    for (int64_t c = 0; c < r; ++c)
        for (int64_t i = 0; i < p; ++i) store(rows + (c * p + i) * lanes<T>, load(reorder + (i * r + c) * lanes<T>));
}

template <class T>
void load_gram(const GramSystems<T>& s, int64_t first, T* rows, T* reorder) {
    const int64_t p = s.p, r = s.r;
    T* right = rows + row_start(p, p) * lanes<T>;
    if (first + lanes<T> <= s.batch) {
        const T* start = s.gram + first * p * p;
        if (p == 8)
            load_lower<8>(rows, Strided<T>{start, 64}, p);
        else if (p == 16)
            load_lower<16>(rows, Strided<T>{start, 256}, p);
        else if (p == 32)
            load_lower<32>(rows, Strided<T>{start, 1024}, p);
        else
            load_lower<0>(rows, Strided<T>{start, p * p}, p);
        load_right<T>(right, Strided<T>{s.right + first * p * r, p * r}, p, r, reorder);
    } else {
        const T* arrays[lanes<T>];
        lane_pointers(arrays, s.gram, p * p, first, s.batch, lanes<T>);
        load_lower<0>(rows, Scattered<T>{arrays}, p);
        lane_pointers(arrays, s.right, p * r, first, s.batch, lanes<T>);
        load_right<T>(right, Scattered<T>{arrays}, p, r, reorder);
    }
}

template <class T>
void gram_tiles(const GramSystems<T>& s, int64_t first_tile, int64_t last_tile, T* scratch) {
    const Layout<T> at(s.p, s.r, s.grid, 0);
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const int64_t first = tile * lanes<T>;
        load_gram(s, first, scratch, scratch + at.reorder * lanes<T>);
        const Solver<T, T> solver{scratch,   at,      s.p, s.r, s.grid, 0, first, s.batch, static_cast<T>(s.tolerance),
                                  s.weights, s.status};
        for (int64_t l = 0; l < s.grid; ++l) solver.solve(static_cast<T>(s.l2[l]), l);
    }
}

// Data rows that are held transposed at a time: enough to amortise the Gram tiles' loads and stores.
PLATONIC_INLINE int64_t data_rows(int64_t m, int64_t features) {
    const int64_t fit = 2048 / features;
    const int64_t rows = fit < 16 ? 16 : fit > 256 ? 256 : fit;
    return m < rows ? m : rows;
}

template <class In>
struct DataLoader {
    const In* arrays[lanes<double>];
    int64_t m, width;
    // Rows [k, k + count) to features [at, at + width) of `data`, less `shift` (a vector a feature) where given.
    void run(double* data, int64_t stride, int64_t k, int64_t count, const double* shift) const {
        int64_t feature = 0, row = 0;
        for (int64_t e = 0; e < count * width; e += group<double>) {
            vdouble values[group<double>];
            load_group<double>(values, Scattered<In>{arrays}, k * width + e, (m - k) * width - e);
            for (int i = 0; i < group<double> && row < count; ++i) {
                const vdouble v = shift == nullptr ? values[i] : values[i] - load(shift + feature * lanes<double>);
                store(data + (feature * stride + row) * lanes<double>, v);
                if (++feature == width) feature = 0, ++row;
            }
        }
    }
};

template <class T>
void data_tiles(const DataSystems<T>& s, int64_t first_tile, int64_t last_tile, double* scratch) {
    constexpr int n = lanes<double>;
    const bool constant = s.intercepts != nullptr;
    const int64_t width = s.p + constant, features = width + s.r;
    const int64_t stride = data_rows(s.m, features);
    const Layout<double> at(width, s.r, s.grid, features * (stride + 1));
    double* data = scratch + at.data * n;
    double* shift = data + features * stride * n;
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const int64_t first = tile * n;
        DataLoader<T> x{{}, s.m, s.p}, y{{}, s.m, s.r};
        lane_pointers(x.arrays, s.x, s.m * s.p, first, s.batch, n);
        lane_pointers(y.arrays, s.y, s.m * s.r, first, s.batch, n);
        for (int64_t i = 0; i < row_start(features, width) * n; ++i) scratch[i] = 0;
        // With a constant, data are taken relative to their first row: centring by the constant's pivot then loses
        // no more digits than the spread of the data has.
        const double* x_shift = nullptr;
        const double* y_shift = nullptr;
        if (constant && s.m > 0) {
            x_shift = shift;
            y_shift = shift + s.p * n;
            x.run(shift, 1, 0, 1, nullptr);
            y.run(shift + s.p * n, 1, 0, 1, nullptr);
        }
        for (int64_t k = 0; k < s.m; k += stride) {
            const int64_t count = s.m - k < stride ? s.m - k : stride;
            if (constant)
                for (int64_t i = 0; i < count; ++i) store(data + i * n, splat(1.0));
            x.run(data + constant * stride * n, stride, k, count, x_shift);
            y.run(data + width * stride * n, stride, k, count, y_shift);
            add_gram(data, stride, count, scratch, width, features);
        }
        const Solver<double, T> solver{scratch, at,      s.p + constant, s.r,       s.grid,  constant,
                                       first,   s.batch, s.tolerance,    s.weights, s.status};
        for (int64_t l = 0; l < s.grid; ++l) {
            solver.solve(s.l2[l], l);
            if (!constant) continue;
            for (int64_t c = 0; c < s.r; ++c) {
                const double* w = solver.right(c);
                vdouble b = load(w) + load(y_shift + c * n);
                for (int64_t j = 0; j < s.p; ++j) b -= load(w + (j + 1) * n) * load(x_shift + j * n);
                for (int lane = 0; lane < solver.used(); ++lane)
                    s.intercepts[((first + lane) * s.grid + l) * s.r + c] = static_cast<T>(b[lane]);
            }
        }
    }
}

}  // namespace

namespace PLATONIC_ISA {

int ridge_lanes(bool single) { return single ? lanes<float> : lanes<double>; }

int64_t gram_scratch(int64_t p, int64_t r, int64_t grid) {
    return Layout<float>(p, r, grid, 0).end * PLATONIC_VECTOR_BYTES;  // the more lanes, the more padding
}

int64_t data_scratch(int64_t m, int64_t p, int64_t r, int64_t grid, bool constant) {
    const int64_t features = p + constant + r;
    return Layout<double>(p + constant, r, grid, features * (data_rows(m, features) + 1)).end * PLATONIC_VECTOR_BYTES;
}

void ridge_tiles(const GramSystems<float>& s, int64_t first_tile, int64_t last_tile, void* scratch) {
    gram_tiles(s, first_tile, last_tile, static_cast<float*>(scratch));
}
void ridge_tiles(const GramSystems<double>& s, int64_t first_tile, int64_t last_tile, void* scratch) {
    gram_tiles(s, first_tile, last_tile, static_cast<double*>(scratch));
}
void ridge_tiles(const DataSystems<float>& s, int64_t first_tile, int64_t last_tile, void* scratch) {
    data_tiles(s, first_tile, last_tile, static_cast<double*>(scratch));
}
void ridge_tiles(const DataSystems<double>& s, int64_t first_tile, int64_t last_tile, void* scratch) {
    data_tiles(s, first_tile, last_tile, static_cast<double*>(scratch));
}

}  // namespace PLATONIC_ISA
}  // namespace platonic
