// Vectors for amplify_simd.cpp: the arithmetic of amplify_math.h on them, and elements of every type in memory.
//
// Included by that file only; no symbol leaves it.
#pragma once

#include "common/simd_math.h"
#include "gradamp/amplify_math.h"

namespace platonic {
namespace {

// alpha e^x for x <= 80, by x = n ln 2 + r and Horner's rule with coefficients times alpha. Where e^x is below the
// smallest normal number it is 0: subnormal numbers are slow, and too small to matter in y - t. Half the instructions
// of exp.
//
// `magic` is 1.5 * 2^mantissa_bits + the exponent's bias: added, it leaves n + bias in the low bits, which the shift
// turns into 2^n while it drops all others. `low` is where they have come down to 0.
//
// Float: the polynomial is minimax, its relative error below 2^-28 for |r| <= 0.347; ln 2 as one number is off by 2e-9,
// so the result is off by 2e-9 |n| in addition to two roundings, 3 ulp at most.
PLATONIC_INLINE vfloat scaled_exp_of(vfloat x, float alpha) {
    constexpr float magic = 12582912.0f + 127, low = -88.2f;
    x = max(splat<float>(low), x);
    const vfloat shifted = x * 1.44269504f + magic;
    const vfloat r = x - (shifted - magic) * 0.693147180559945f;
    vfloat p = splat<float>(alpha * 0x1.6a2318p-10f);
    p = p * r + alpha * 0x1.123a8ep-7f;
    p = p * r + alpha * 0x1.5558f6p-5f;
    p = p * r + alpha * 0x1.555490p-3f;
    p = p * r + alpha * 0x1.fffffcp-2f;
    p = p * r + alpha;
    p = p * r + alpha;
    return p * (vfloat)((vint32)shifted << 23);
}
PLATONIC_INLINE vdouble scaled_exp_of(vdouble x, double alpha) {
    typedef MathConstants<double> K;
    constexpr double magic = K::magic + K::bias, low = -709.4;
    x = max(splat<double>(low), x);
    const vdouble shifted = x * 1.4426950408889634074 + magic, n = shifted - magic;
    const vdouble r = (x - n * K::ln2_hi) - n * K::ln2_lo;
    const vdouble p = (r + r * r * exp_tail(r)) + 1.0;
    return alpha * p * (vdouble)((vint64)shifted << 52);
}

// Whether a > b in some lane.
#if defined(__AVX512F__)
PLATONIC_INLINE bool any_greater(vfloat a, vfloat b) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
}
PLATONIC_INLINE bool any_greater(vdouble a, vdouble b) {
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) != 0;
}
#elif defined(__AVX2__)
PLATONIC_INLINE bool any_greater(vfloat a, vfloat b) { return _mm256_movemask_ps((__m256)(a > b)) != 0; }
PLATONIC_INLINE bool any_greater(vdouble a, vdouble b) { return _mm256_movemask_pd((__m256d)(a > b)) != 0; }
#else
template <class V>
PLATONIC_INLINE bool any_greater(V a, V b) {
    bool any = false;
    for (unsigned i = 0; i < sizeof a / sizeof a[0]; ++i) any |= a[i] > b[i];
    return any;
}
#endif

template <class A>
struct VectorMath {
    typedef A number;
    typedef vec_t<A> V;
    static constexpr A largest = NumberMath<A>::largest;
    static PLATONIC_INLINE V scaled_exp(V x, A alpha) { return scaled_exp_of(x, alpha); }
    static PLATONIC_INLINE V min(V a, V b) { return platonic::min(a, b); }
    static PLATONIC_INLINE V max(V a, V b) { return platonic::max(a, b); }
    static PLATONIC_INLINE V splat(A x) { return platonic::splat<A>(x); }
    static PLATONIC_INLINE bool any_above(V x, A limit) { return any_greater(x, splat(limit)); }
};

// ---- elements in memory: how A, the type of arithmetic, is loaded and stored ----

template <class T>
struct Plain {
    typedef T element;
    typedef T A;
    static constexpr T largest = NumberMath<T>::largest;
    static PLATONIC_INLINE vec_t<T> load(const T* p) { return platonic::load(p); }
    static PLATONIC_INLINE void store(T* p, vec_t<T> v) { platonic::store(p, v); }
    // Past the caches, which saves reading the line that is overwritten.
    static PLATONIC_INLINE void stream(T* p, vec_t<T> v) {
        const bool aligned = reinterpret_cast<uintptr_t>(p) % PLATONIC_VECTOR_BYTES == 0;
#if defined(__AVX512F__)
        if (aligned) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
        if (aligned) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
        (void)aligned;
        platonic::store(p, v);
    }
};

// Before another thread may read what was streamed.
PLATONIC_INLINE void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

typedef uint16_t vuint16 __attribute__((vector_size(PLATONIC_VECTOR_BYTES / 2)));

PLATONIC_INLINE vint32 load_16_bits(const uint16_t* p) {
    vuint16 bits;
    std::memcpy(&bits, p, sizeof bits);
    return __builtin_convertvector(bits, vint32);
}
PLATONIC_INLINE void store_16_bits(uint16_t* p, vint32 v) {
    const vuint16 bits = __builtin_convertvector(v, vuint16);
    std::memcpy(p, &bits, sizeof bits);
}
struct Half {
    typedef uint16_t element;
    typedef float A;
    static constexpr float largest = 65504.0f;
    static PLATONIC_INLINE vfloat load(const uint16_t* p) {
#if defined(__AVX512F__)
        __m256i bits;
        std::memcpy(&bits, p, sizeof bits);
        return (vfloat)_mm512_maskz_cvtph_ps(0xffff, bits);
#else
        const vint32 h = load_16_bits(p);
        const vint32 special = (vint32)((h & 0x7c00) == 0x7c00) & 0x7f800000;
        const vfloat magnitude = (vfloat)((h & 0x7fff) << 13) * 0x1p112f;
        return (vfloat)((vint32)magnitude | special | (h & 0x8000) << 16);
#endif
    }
    static PLATONIC_INLINE void store(uint16_t* p, vfloat v) {
#if defined(__AVX512F__)
        const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
        std::memcpy(p, &bits, sizeof bits);
#else
        const vint32 bits = (vint32)v & 0x7fffffff, sign = (vint32)v >> 16 & 0x8000;
        const vint32 normal = (bits + 0xfff + (bits >> 13 & 1) - (112 << 23)) >> 13;
        const vint32 small = (vint32)((vfloat)bits + 0.5f) - 0x3f000000;  // the addition rounds at the right bit
        vint32 half = bits < 0x38800000 ? small : normal;
        half = bits >= 0x477ff000 ? 0x7c00 - vint32{} : half;
        half = bits > 0x7f800000 ? 0x7e00 - vint32{} : half;
        store_16_bits(p, half | sign);
#endif
    }
    static PLATONIC_INLINE void stream(uint16_t* p, vfloat v) { store(p, v); }
};

struct Bfloat {
    typedef uint16_t element;
    typedef float A;
    static constexpr float largest = 0x1.fep127f;
    static PLATONIC_INLINE vfloat load(const uint16_t* p) { return (vfloat)(load_16_bits(p) << 16); }
    static PLATONIC_INLINE void store(uint16_t* p, vfloat v) {
        const vint32 bits = (vint32)v;
        const vint32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        store_16_bits(p, (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
    }
    static PLATONIC_INLINE void stream(uint16_t* p, vfloat v) { store(p, v); }
};

template <class S>
PLATONIC_INLINE vec_t<typename S::A> load_first(const typename S::element* p, int64_t count) {
    typename S::element buffer[lanes<typename S::A>] = {};
    std::memcpy(buffer, p, count * sizeof *p);
    return S::load(buffer);
}
template <class S>
PLATONIC_INLINE void store_first(typename S::element* p, vec_t<typename S::A> v, int64_t count) {
    typename S::element buffer[lanes<typename S::A>];
    S::store(buffer, v);
    std::memcpy(p, buffer, count * sizeof *p);
}

template <class A>
using ivec_t = typename Simd<A>::ivec;
template <class A>
using int_t = decltype(+ivec_t<A>{}[0]);

}  // namespace
}  // namespace platonic
