// Between arrays that belong to one problem each and vectors that hold one value of every problem: a lane is a
// problem. load_lanes reads the same `count` consecutive elements of every lane's array and gives one vector an
// element; store_lanes is its inverse. Both go through in-register transposes of square tiles.
//
// Included by *_simd.cpp files only (see simd.h).
#pragma once

#include "common/simd.h"

namespace platonic {
namespace {

#if defined(__AVX512F__)

// The maskz_ forms with full masks compile to the plain instructions, without the undefined operands that make
// GCC 12 warn about its own header.
PLATONIC_INLINE void transpose(vfloat (&r)[16]) {
    __m512 t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_maskz_unpacklo_ps(0xffff, (__m512)r[2 * i], (__m512)r[2 * i + 1]);
        t[2 * i + 1] = _mm512_maskz_unpackhi_ps(0xffff, (__m512)r[2 * i], (__m512)r[2 * i + 1]);
    }
    __m512d u[16];  // u[4 i + c], quarter q: column 4 q + c of rows 4 i .. 4 i + 3
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        u[4 * i] = _mm512_maskz_unpacklo_pd(0xff, (__m512d)t[4 * i], (__m512d)t[4 * i + 2]);
        u[4 * i + 1] = _mm512_maskz_unpackhi_pd(0xff, (__m512d)t[4 * i], (__m512d)t[4 * i + 2]);
        u[4 * i + 2] = _mm512_maskz_unpacklo_pd(0xff, (__m512d)t[4 * i + 1], (__m512d)t[4 * i + 3]);
        u[4 * i + 3] = _mm512_maskz_unpackhi_pd(0xff, (__m512d)t[4 * i + 1], (__m512d)t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512d even_low = _mm512_maskz_shuffle_f64x2(0xff, u[c], u[4 + c], 0x88);
        const __m512d odd_low = _mm512_maskz_shuffle_f64x2(0xff, u[c], u[4 + c], 0xdd);
        const __m512d even_high = _mm512_maskz_shuffle_f64x2(0xff, u[8 + c], u[12 + c], 0x88);
        const __m512d odd_high = _mm512_maskz_shuffle_f64x2(0xff, u[8 + c], u[12 + c], 0xdd);
        r[c] = (vfloat)_mm512_maskz_shuffle_f64x2(0xff, even_low, even_high, 0x88);
        r[4 + c] = (vfloat)_mm512_maskz_shuffle_f64x2(0xff, odd_low, odd_high, 0x88);
        r[8 + c] = (vfloat)_mm512_maskz_shuffle_f64x2(0xff, even_low, even_high, 0xdd);
        r[12 + c] = (vfloat)_mm512_maskz_shuffle_f64x2(0xff, odd_low, odd_high, 0xdd);
    }
}

PLATONIC_INLINE void transpose(vdouble (&r)[8]) {
    __m512d t[8];  // t[2 i + c], quarter q: column 2 q + c of rows 2 i and 2 i + 1
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm512_maskz_unpacklo_pd(0xff, (__m512d)r[2 * i], (__m512d)r[2 * i + 1]);
        t[2 * i + 1] = _mm512_maskz_unpackhi_pd(0xff, (__m512d)r[2 * i], (__m512d)r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
        const __m512d even_low = _mm512_maskz_shuffle_f64x2(0xff, t[c], t[2 + c], 0x88);
        const __m512d odd_low = _mm512_maskz_shuffle_f64x2(0xff, t[c], t[2 + c], 0xdd);
        const __m512d even_high = _mm512_maskz_shuffle_f64x2(0xff, t[4 + c], t[6 + c], 0x88);
        const __m512d odd_high = _mm512_maskz_shuffle_f64x2(0xff, t[4 + c], t[6 + c], 0xdd);
        r[c] = (vdouble)_mm512_maskz_shuffle_f64x2(0xff, even_low, even_high, 0x88);
        r[2 + c] = (vdouble)_mm512_maskz_shuffle_f64x2(0xff, odd_low, odd_high, 0x88);
        r[4 + c] = (vdouble)_mm512_maskz_shuffle_f64x2(0xff, even_low, even_high, 0xdd);
        r[6 + c] = (vdouble)_mm512_maskz_shuffle_f64x2(0xff, odd_low, odd_high, 0xdd);
    }
}

#elif defined(__AVX2__)

PLATONIC_INLINE void transpose(vfloat (&r)[8]) {
    __m256 t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    }
    __m256 u[8];  // u[4 i + c], half q: column 4 q + c of rows 4 i .. 4 i + 3
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        r[c] = (vfloat)_mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
        r[4 + c] = (vfloat)_mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
    }
}

PLATONIC_INLINE void transpose(vdouble (&r)[4]) {
    __m256d t[4];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        t[2 * i] = _mm256_unpacklo_pd((__m256d)r[2 * i], (__m256d)r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_pd((__m256d)r[2 * i], (__m256d)r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
        r[c] = (vdouble)_mm256_permute2f128_pd(t[c], t[2 + c], 0x20);
        r[2 + c] = (vdouble)_mm256_permute2f128_pd(t[c], t[2 + c], 0x31);
    }
}

#else

template <class V, int N>
PLATONIC_INLINE void transpose(V (&r)[N]) {
    V t[N];
    for (int i = 0; i < N; ++i) t[i] = r[i];
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) r[i][j] = t[j][i];
}

#endif

template <class T, class Out>
PLATONIC_INLINE void store_some(Out* p, vec_t<T> v, int64_t count) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Out) == 4 && sizeof(T) == 4) {
        _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
        return;
    }
    if constexpr (sizeof(Out) == 8) {
        _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
        return;
    }
#endif
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<Out>(v[i]);
}

// Where the lanes' arrays start: anywhere, or `stride` elements apart.
template <class In>
struct Scattered {
    typedef In element;
    const In* const* arrays;
    PLATONIC_INLINE const In* operator[](int lane) const { return arrays[lane]; }
};
template <class In>
struct Strided {
    typedef In element;
    const In* first;
    int64_t stride;
    PLATONIC_INLINE const In* operator[](int lane) const { return first + lane * stride; }
};

// Elements of T in 16 bytes: the columns that load_group brings in at a time.
template <class T>
constexpr int group = 16 / static_cast<int>(sizeof(T));

// group[c] = element `at + c` of every lane's array. 16 bytes of each array are put in place by the load itself
// (inserting from memory needs no shuffle), so that only the transposes within 16 bytes remain.
template <class Arrays>
PLATONIC_INLINE void load_group(vfloat (&to)[4], Arrays arrays, int64_t at) {
#if defined(__AVX512F__)
    __m512 u[4], t[4];
#pragma GCC unroll 4
    for (int a = 0; a < 4; ++a) {
        u[a] = _mm512_castps128_ps512(_mm_loadu_ps(arrays[a] + at));
        u[a] = _mm512_maskz_insertf32x4(0xffff, u[a], _mm_loadu_ps(arrays[4 + a] + at), 1);
        u[a] = _mm512_maskz_insertf32x4(0xffff, u[a], _mm_loadu_ps(arrays[8 + a] + at), 2);
        u[a] = _mm512_maskz_insertf32x4(0xffff, u[a], _mm_loadu_ps(arrays[12 + a] + at), 3);
    }
    t[0] = _mm512_maskz_unpacklo_ps(0xffff, u[0], u[1]);
    t[1] = _mm512_maskz_unpackhi_ps(0xffff, u[0], u[1]);
    t[2] = _mm512_maskz_unpacklo_ps(0xffff, u[2], u[3]);
    t[3] = _mm512_maskz_unpackhi_ps(0xffff, u[2], u[3]);
    to[0] = (vfloat)_mm512_maskz_unpacklo_pd(0xff, (__m512d)t[0], (__m512d)t[2]);
    to[1] = (vfloat)_mm512_maskz_unpackhi_pd(0xff, (__m512d)t[0], (__m512d)t[2]);
    to[2] = (vfloat)_mm512_maskz_unpacklo_pd(0xff, (__m512d)t[1], (__m512d)t[3]);
    to[3] = (vfloat)_mm512_maskz_unpackhi_pd(0xff, (__m512d)t[1], (__m512d)t[3]);
#elif defined(__AVX2__)
    __m256 u[4], t[4];
#pragma GCC unroll 4
    for (int a = 0; a < 4; ++a) {
        u[a] = _mm256_castps128_ps256(_mm_loadu_ps(arrays[a] + at));
        u[a] = _mm256_insertf128_ps(u[a], _mm_loadu_ps(arrays[4 + a] + at), 1);
    }
    t[0] = _mm256_unpacklo_ps(u[0], u[1]);
    t[1] = _mm256_unpackhi_ps(u[0], u[1]);
    t[2] = _mm256_unpacklo_ps(u[2], u[3]);
    t[3] = _mm256_unpackhi_ps(u[2], u[3]);
    to[0] = (vfloat)_mm256_shuffle_ps(t[0], t[2], 0x44);
    to[1] = (vfloat)_mm256_shuffle_ps(t[0], t[2], 0xee);
    to[2] = (vfloat)_mm256_shuffle_ps(t[1], t[3], 0x44);
    to[3] = (vfloat)_mm256_shuffle_ps(t[1], t[3], 0xee);
#else
    for (int c = 0; c < 4; ++c) {
        float values[lanes<float>];
        for (int lane = 0; lane < lanes<float>; ++lane) values[lane] = arrays[lane][at + c];
        to[c] = load(values);
    }
#endif
}

template <class Arrays>
PLATONIC_INLINE void load_group(vdouble (&to)[2], Arrays arrays, int64_t at) {
    if constexpr (sizeof(typename Arrays::element) == 4) {  // converted one by one
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
            double values[lanes<double>];
#pragma GCC unroll 8
            for (int lane = 0; lane < lanes<double>; ++lane) values[lane] = arrays[lane][at + c];
            to[c] = load(values);
        }
    } else {
#if defined(__AVX512F__)
        __m512d u[2];
#pragma GCC unroll 2
        for (int a = 0; a < 2; ++a) {
            u[a] = _mm512_castpd128_pd512(_mm_loadu_pd(arrays[a] + at));
            u[a] = _mm512_maskz_insertf64x2(0xff, u[a], _mm_loadu_pd(arrays[2 + a] + at), 1);
            u[a] = _mm512_maskz_insertf64x2(0xff, u[a], _mm_loadu_pd(arrays[4 + a] + at), 2);
            u[a] = _mm512_maskz_insertf64x2(0xff, u[a], _mm_loadu_pd(arrays[6 + a] + at), 3);
        }
        to[0] = (vdouble)_mm512_maskz_unpacklo_pd(0xff, u[0], u[1]);
        to[1] = (vdouble)_mm512_maskz_unpackhi_pd(0xff, u[0], u[1]);
#elif defined(__AVX2__)
        __m256d u[2];
#pragma GCC unroll 2
        for (int a = 0; a < 2; ++a) {
            u[a] = _mm256_castpd128_pd256(_mm_loadu_pd(arrays[a] + at));
            u[a] = _mm256_insertf128_pd(u[a], _mm_loadu_pd(arrays[2 + a] + at), 1);
        }
        to[0] = (vdouble)_mm256_unpacklo_pd(u[0], u[1]);
        to[1] = (vdouble)_mm256_unpackhi_pd(u[0], u[1]);
#else
        for (int c = 0; c < 2; ++c) {
            double values[lanes<double>];
            for (int lane = 0; lane < lanes<double>; ++lane) values[lane] = arrays[lane][at + c];
            to[c] = load(values);
        }
#endif
    }
}

// The same with at most `readable` elements read from each array; those beyond it are 0.
template <class T, class Arrays>
PLATONIC_INLINE void load_group(vec_t<T> (&to)[group<T>], Arrays arrays, int64_t at, int64_t readable) {
    if (readable >= group<T>) return load_group(to, arrays, at);
#pragma GCC unroll 4
    for (int c = 0; c < group<T>; ++c) {
        T values[lanes<T>] = {};
        if (c < readable)
            for (int lane = 0; lane < lanes<T>; ++lane) values[lane] = static_cast<T>(arrays[lane][at + c]);
        to[c] = load(values);
    }
}

// to[e] = element `at + e` of every lane, for e in [0, count); up to group - 1 vectors beyond them are overwritten.
// `readable` >= count: how many elements from `at` on may be read.
template <class T, class Arrays>
PLATONIC_INLINE void load_lanes(T* to, Arrays arrays, int64_t at, int64_t count, int64_t readable) {
    for (int64_t e = 0; e < count; e += group<T>) {
        vec_t<T> v[group<T>];
        load_group<T>(v, arrays, at + e, readable - e);
#pragma GCC unroll 4
        for (int c = 0; c < group<T>; ++c) store(to + (e + c) * lanes<T>, v[c]);
    }
}

// Element `at + e` of lane's array = from[e] of that lane, for e in [0, count) and the first `used` lanes. Up to
// lanes - 1 vectors beyond from[count - 1] are read.
template <class T, class Out>
PLATONIC_INLINE void store_lanes(Out* const* arrays, int64_t at, const T* from, int64_t count, int used) {
    for (int64_t e = 0; e < count; e += lanes<T>) {
        vec_t<T> tile[lanes<T>];
#pragma GCC unroll 16
        for (int i = 0; i < lanes<T>; ++i) tile[i] = load<T>(from + (e + i) * lanes<T>);
        transpose(tile);
        const int64_t here = count - e < lanes<T> ? count - e : lanes<T>;
        if (sizeof(T) == sizeof(Out) && here == lanes<T> && used == lanes<T>) {
#pragma GCC unroll 16
            for (int lane = 0; lane < lanes<T>; ++lane)
                __builtin_memcpy(arrays[lane] + at + e, &tile[lane], sizeof(vec_t<T>));
        } else {
            for (int lane = 0; lane < used; ++lane) store_some<T>(arrays[lane] + at + e, tile[lane], here);
        }
    }
}

}  // namespace
}  // namespace platonic
