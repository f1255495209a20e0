// Gram matrices, Cholesky factors and solutions of as many problems as a vector has lanes, one problem a lane.
//
// Layout ("rows"): every value is a vector of lanes<T>. Row i of the lower triangle starts at row_start(i); after the
// `width` rows of the matrix come the right-hand sides as further rows of `width` values each. So the Cholesky
// recurrence run over all rows does the forward substitution as well: row `width + c` of [G; C'] becomes L^-1 C_c.
// The diagonal of a factor holds reciprocals.
//
// All loops are over tiles of tile_rows x tile_rows vectors that stay in registers while the inner product over the
// finished columns runs: 16 multiply-adds for 8 loads with AVX-512, whatever level of cache the rows lie in.
//
// Included by *_simd.cpp files only (see simd.h).
#pragma once

#include "common/simd.h"

namespace platonic {
namespace {

constexpr int tile_rows = vector_registers >= 32 ? 4 : 3;

PLATONIC_INLINE int64_t row_start(int64_t i, int64_t width) {
    return i < width ? i * (i + 1) / 2 : width * (width + 1) / 2 + (i - width) * width;
}

// Calls body.template run<M>() with M = n, 1 <= n <= tile_rows.
template <class Body>
PLATONIC_INLINE void with_constant(int64_t n, const Body& body) {
    if (tile_rows >= 4 && n == 4) return body.template run<tile_rows>();
    if (n == 3) return body.template run<3>();
    if (n == 2) return body.template run<2>();
    return body.template run<1>();
}

// sums[a][b] += or -= left[a] . right[b] over `count` vectors; above the diagonal nothing when Lower.
template <class T, int M, int N, bool Subtract, bool Lower>
PLATONIC_INLINE void multiply_rows(vec_t<T> (&sums)[M][N], const T* const (&left)[M], const T* const (&right)[N],
                                   int64_t count) {
    for (int64_t k = 0; k < count * lanes<T>; k += lanes<T>) {
        vec_t<T> b[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) b[j] = load(right[j] + k);
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) {
            const vec_t<T> a = load(left[i] + k);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) {
                if (Lower && j > i) continue;
                if (Subtract)
                    sums[i][j] -= a * b[j];
                else
                    sums[i][j] += a * b[j];
            }
        }
    }
}

// 1 / sqrt(a), to about 2 units in the last place. AVX-512's 14-bit estimate and Newton steps y += y (1/2 - a/2 y y)
// take a third of the time that a square root and a division would, and every pivot waits for this.
PLATONIC_INLINE vfloat reciprocal_sqrt(vfloat a) {
#if defined(__AVX512F__)
    const vfloat half = 0.5f * a;
    const vfloat y = (vfloat)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)a);
    return y + y * (0.5f - half * y * y);
#else
    return 1.0f / sqrt(a);
#endif
}
PLATONIC_INLINE vdouble reciprocal_sqrt(vdouble a) {
#if defined(__AVX512F__)
    const vdouble half = 0.5 * a;
    vdouble y = (vdouble)_mm512_maskz_rsqrt14_pd(0xff, (__m512d)a);
    y += y * (0.5 - half * y * y);
    return y + y * (0.5 - half * y * y);
#else
    return 1.0 / sqrt(a);
#endif
}

// --- factor -------------------------------------------------------------------------------------------------------

template <class T>
struct Factoring {
    const T* from;        // rows of [G; C']; may be `to`
    T* to;                // rows of the factor, then of L^-1 C
    int64_t width;        // unknowns
    int64_t rows;         // width + right-hand sides
    int64_t unpenalised;  // that many leading unknowns do not get l2
    T l2, tolerance;
    typename Simd<T>::ivec status;  // 0, or 1 + the first refused pivot
};

// Rows [i, i + M), columns [j, j + N) left of the diagonal.
template <class T, int M, int N>
void factor_tile(const Factoring<T>& f, int64_t i, int64_t j) {
    vec_t<T> x[M][N];
    const T* left[M];
    const T* right[N];
#pragma GCC unroll 4
    for (int a = 0; a < M; ++a) {
        const int64_t start = row_start(i + a, f.width) * lanes<T>;
        left[a] = f.to + start;
#pragma GCC unroll 4
        for (int b = 0; b < N; ++b) x[a][b] = load(f.from + start + (j + b) * lanes<T>);
    }
#pragma GCC unroll 4
    for (int b = 0; b < N; ++b) right[b] = f.to + row_start(j + b, f.width) * lanes<T>;
    multiply_rows<T, M, N, true, false>(x, left, right, j);
#pragma GCC unroll 4
    for (int b = 0; b < N; ++b) {
#pragma GCC unroll 4
        for (int c = 0; c < b; ++c) {
            const vec_t<T> l = load(right[b] + (j + c) * lanes<T>);
#pragma GCC unroll 4
            for (int a = 0; a < M; ++a) x[a][b] -= x[a][c] * l;
        }
        const vec_t<T> reciprocal = load(right[b] + (j + b) * lanes<T>);
#pragma GCC unroll 4
        for (int a = 0; a < M; ++a) {
            x[a][b] *= reciprocal;
            store(f.to + row_start(i + a, f.width) * lanes<T> + (j + b) * lanes<T>, x[a][b]);
        }
    }
}

// The triangle of rows and columns [i, i + M).
template <class T, int M>
void factor_diagonal(Factoring<T>& f, int64_t i) {
    typedef typename Simd<T>::ivec ivec;
    vec_t<T> x[M][M], floor[M];
    const T* rows[M];
#pragma GCC unroll 4
    for (int a = 0; a < M; ++a) {
        const int64_t start = row_start(i + a, f.width) * lanes<T>;
        rows[a] = f.to + start;
#pragma GCC unroll 4
        for (int b = 0; b < M; ++b)
            if (b <= a) x[a][b] = load(f.from + start + (i + b) * lanes<T>);
        if (i + a >= f.unpenalised) x[a][a] += f.l2;
        floor[a] = max(x[a][a] * f.tolerance, vec_t<T>{});
    }
    multiply_rows<T, M, M, true, true>(x, rows, rows, i);
#pragma GCC unroll 4
    for (int b = 0; b < M; ++b) {
        const vec_t<T> pivot = x[b][b];
        const T largest = sizeof(T) == 4 ? (T)__FLT_MAX__ : (T)__DBL_MAX__;
        const ivec good = (ivec)(pivot > floor[b]) & (ivec)(pivot <= largest);
        f.status |= ~good & (f.status == 0) & (ivec{} + static_cast<int32_t>(i + b + 1));
        const vec_t<T> reciprocal = reciprocal_sqrt(pivot);
        x[b][b] = reciprocal;
#pragma GCC unroll 4
        for (int a = 0; a < M; ++a) {
            if (a <= b) continue;
            x[a][b] *= reciprocal;
#pragma GCC unroll 4
            for (int c = 0; c < M; ++c)
                if (c > b && c < a) x[a][c] -= x[a][b] * x[c][b];
            x[a][a] -= x[a][b] * x[a][b];
        }
    }
#pragma GCC unroll 4
    for (int a = 0; a < M; ++a)
#pragma GCC unroll 4
        for (int b = 0; b < M; ++b)
            if (b <= a) store(f.to + (row_start(i + a, f.width) + i + b) * lanes<T>, x[a][b]);
}

template <class T>
struct FactorRows {
    Factoring<T>& f;
    int64_t i, end;  // columns [0, end) of rows [i, i + M)
    template <int M>
    void run() const {
        int64_t j = 0;
        for (; j + tile_rows <= end; j += tile_rows) factor_tile<T, M, tile_rows>(f, i, j);
        if (end - j >= 3) factor_tile<T, M, 3>(f, i, j);
        if (end - j == 2) factor_tile<T, M, 2>(f, i, j);
        if (end - j == 1) factor_tile<T, M, 1>(f, i, j);
        if (i < f.width) factor_diagonal<T, M>(f, i);
    }
};

// Factors [G + l2 I; C'] row block by row block; leaves the first refused pivot of every lane in f.status.
template <class T>
PLATONIC_INLINE void factor_rows(Factoring<T>& f) {
    f.status ^= f.status;
    for (int64_t i = 0; i < f.rows;) {
        const int64_t end = i < f.width ? f.width : f.rows;
        const int64_t count = end - i < tile_rows ? end - i : tile_rows;
        with_constant(count, FactorRows<T>{f, i, i < f.width ? i : f.width});
        i += count;
    }
}

// --- back substitution --------------------------------------------------------------------------------------------

template <class T>
struct BackSubstitution {
    const T* factor;
    T* y;  // width vectors
    int64_t width, i;

    // Solves for unknowns [i, i + M) and takes them out of the rows above.
    template <int M>
    void run() const {
        const T* rows[M];
        vec_t<T> w[M];
#pragma GCC unroll 4
        for (int a = 0; a < M; ++a) {
            rows[a] = factor + row_start(i + a, width) * lanes<T>;
            w[a] = load(y + (i + a) * lanes<T>);
        }
#pragma GCC unroll 4
        for (int a = M - 1; a >= 0; --a) {
            w[a] *= load(rows[a] + (i + a) * lanes<T>);
            store(y + (i + a) * lanes<T>, w[a]);
#pragma GCC unroll 4
            for (int b = 0; b < a; ++b) w[b] -= w[a] * load(rows[a] + (i + b) * lanes<T>);
        }
        for (int64_t k = 0; k < i * lanes<T>; k += lanes<T>) {
            vec_t<T> sum = load(y + k);
#pragma GCC unroll 4
            for (int a = 0; a < M; ++a) sum -= w[a] * load(rows[a] + k);
            store(y + k, sum);
        }
    }
};

// y <- L^-T y.
template <class T>
PLATONIC_INLINE void substitute_back(const T* factor, int64_t width, T* y) {
    int64_t end = width;
    while (end > 0) {
        const int64_t count = (end - 1) % tile_rows + 1;
        end -= count;
        with_constant(count, BackSubstitution<T>{factor, y, width, end});
    }
}

// --- Gram ---------------------------------------------------------------------------------------------------------

// Feature f of data row k lies at data + (f * stride + k) * lanes.
template <class T>
struct GramUpdate {
    const T* data;
    int64_t stride, count;  // data rows in all and in use
    T* rows;
    int64_t width, i, end;  // columns [0, end) of rows [i, i + M)

    template <int M>
    void run() const {
        int64_t j = 0;
        for (; j + tile_rows <= end; j += tile_rows) add<M, tile_rows>(j);
        if (end - j >= 3) add<M, 3>(j);
        if (end - j == 2) add<M, 2>(j);
        if (end - j == 1) add<M, 1>(j);
        if (i < width) add<M, M>(i);
    }

    template <int M, int N>
    void add(int64_t j) const {
        vec_t<T> sums[M][N];
        const T* left[M];
        const T* right[N];
#pragma GCC unroll 4
        for (int b = 0; b < N; ++b) right[b] = data + (j + b) * stride * lanes<T>;
#pragma GCC unroll 4
        for (int a = 0; a < M; ++a) {
            left[a] = data + (i + a) * stride * lanes<T>;
#pragma GCC unroll 4
            for (int b = 0; b < N; ++b)
                sums[a][b] = j + b <= i + a ? load(rows + (row_start(i + a, width) + j + b) * lanes<T>) : vec_t<T>{};
        }
        multiply_rows<T, M, N, false, false>(sums, left, right, count);
#pragma GCC unroll 4
        for (int a = 0; a < M; ++a)
#pragma GCC unroll 4
            for (int b = 0; b < N; ++b)
                if (j + b <= i + a) store(rows + (row_start(i + a, width) + j + b) * lanes<T>, sums[a][b]);
    }
};

// rows += [X Y]' X for the `count` data rows of X (features [0, width)) and Y (features [width, features)).
template <class T>
PLATONIC_INLINE void add_gram(const T* data, int64_t stride, int64_t count, T* rows, int64_t width, int64_t features) {
    for (int64_t i = 0; i < features;) {
        const int64_t end = i < width ? width : features;
        const int64_t step = end - i < tile_rows ? end - i : tile_rows;
        with_constant(step, GramUpdate<T>{data, stride, count, rows, width, i, i < width ? i : width});
        i += step;
    }
}

}  // namespace
}  // namespace platonic
