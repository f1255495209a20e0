// Vectors of the instruction set that a *_simd.cpp file is being compiled for, as GCC vector extensions: + - * /
// and comparisons work lane by lane, `mask ? a : b` selects. On machines other than x86-64 the 16-byte vectors of
// the scalar build become NEON or whatever the compiler has.
//
// Included by *_simd.cpp files only; everything sits in an anonymous namespace, so that no symbol compiled for one
// instruction set can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define PLATONIC_VECTOR_BYTES 64
// GCC 12 warns of operands that its own intrinsics leave unset. The other instruction sets' builds still look.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#elif defined(__AVX2__)
#define PLATONIC_VECTOR_BYTES 32
#else
#define PLATONIC_VECTOR_BYTES 16
#endif

#define PLATONIC_INLINE inline __attribute__((always_inline))

namespace platonic {
namespace {

typedef float vfloat __attribute__((vector_size(PLATONIC_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(PLATONIC_VECTOR_BYTES)));
typedef int32_t vint32 __attribute__((vector_size(PLATONIC_VECTOR_BYTES)));
typedef int64_t vint64 __attribute__((vector_size(PLATONIC_VECTOR_BYTES)));

template <class T>
struct Simd;
template <>
struct Simd<float> {
    typedef vfloat vec;
    typedef vint32 ivec;
};
template <>
struct Simd<double> {
    typedef vdouble vec;
    typedef vint64 ivec;
};

template <class T>
using vec_t = typename Simd<T>::vec;

template <class T>
constexpr int lanes = PLATONIC_VECTOR_BYTES / static_cast<int>(sizeof(T));

// Registers that hold accumulators while the inner loops of products run.
#if defined(__AVX512F__)
constexpr int vector_registers = 32;
#else
constexpr int vector_registers = 16;
#endif

template <class T>
PLATONIC_INLINE vec_t<T> load(const T* p) {
    vec_t<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
// The first `count` <= lanes elements at p, the rest zero, reading nothing beyond.
#if defined(__AVX512F__)
PLATONIC_INLINE vfloat load_some(const float* p, int64_t count) {
    return (vfloat)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
}
PLATONIC_INLINE vdouble load_some(const double* p, int64_t count) {
    return (vdouble)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), p);
}
#elif defined(__AVX2__)
PLATONIC_INLINE vfloat load_some(const float* p, int64_t count) {
    const vint32 inside = vint32{0, 1, 2, 3, 4, 5, 6, 7} < (vint32{} + static_cast<int32_t>(count));
    return (vfloat)_mm256_maskload_ps(p, (__m256i)inside);
}
PLATONIC_INLINE vdouble load_some(const double* p, int64_t count) {
    const vint64 inside = vint64{0, 1, 2, 3} < (vint64{} + count);
    return (vdouble)_mm256_maskload_pd(p, (__m256i)inside);
}
#else
template <class T>
PLATONIC_INLINE vec_t<T> load_some(const T* p, int64_t count) {
    vec_t<T> v = {};
    for (int64_t i = 0; i < count; ++i) v[i] = p[i];
    return v;
}
#endif

template <class T>
PLATONIC_INLINE void store(T* p, vec_t<T> v) {
    std::memcpy(p, &v, sizeof v);
}
template <class T>
PLATONIC_INLINE vec_t<T> splat(T x) {
    return x - vec_t<T>{};  // minus, not plus: x - 0 is x itself, -0 too, so that no instruction is left of it
}

// a > b ? a : b and a < b ? a : b: the second argument where either is NaN. (GCC 12 warns about the plain 512-bit
// intrinsics, whose unused operand it leaves unset.)
#if defined(__AVX512F__)
PLATONIC_INLINE vfloat max(vfloat a, vfloat b) { return (vfloat)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
PLATONIC_INLINE vdouble max(vdouble a, vdouble b) { return (vdouble)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b); }
PLATONIC_INLINE vfloat min(vfloat a, vfloat b) { return (vfloat)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
PLATONIC_INLINE vdouble min(vdouble a, vdouble b) { return (vdouble)_mm512_maskz_min_pd(0xff, (__m512d)a, (__m512d)b); }
#elif defined(__AVX2__)
PLATONIC_INLINE vfloat max(vfloat a, vfloat b) { return (vfloat)_mm256_max_ps((__m256)a, (__m256)b); }
PLATONIC_INLINE vdouble max(vdouble a, vdouble b) { return (vdouble)_mm256_max_pd((__m256d)a, (__m256d)b); }
PLATONIC_INLINE vfloat min(vfloat a, vfloat b) { return (vfloat)_mm256_min_ps((__m256)a, (__m256)b); }
PLATONIC_INLINE vdouble min(vdouble a, vdouble b) { return (vdouble)_mm256_min_pd((__m256d)a, (__m256d)b); }
#else
PLATONIC_INLINE vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }
PLATONIC_INLINE vdouble max(vdouble a, vdouble b) { return a > b ? a : b; }
PLATONIC_INLINE vfloat min(vfloat a, vfloat b) { return a < b ? a : b; }
PLATONIC_INLINE vdouble min(vdouble a, vdouble b) { return a < b ? a : b; }
#endif

PLATONIC_INLINE vfloat sqrt(vfloat a) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_sqrt_ps(0xffff, (__m512)a);
#elif defined(__AVX2__)
    return (vfloat)_mm256_sqrt_ps((__m256)a);
#else
    for (int i = 0; i < lanes<float>; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
#endif
}
PLATONIC_INLINE vdouble sqrt(vdouble a) {
#if defined(__AVX512F__)
    return (vdouble)_mm512_maskz_sqrt_pd(0xff, (__m512d)a);
#elif defined(__AVX2__)
    return (vdouble)_mm256_sqrt_pd((__m256d)a);
#else
    for (int i = 0; i < lanes<double>; ++i) a[i] = __builtin_sqrt(a[i]);
    return a;
#endif
}

template <class T>
PLATONIC_INLINE T horizontal_sum(vec_t<T> v) {
    T total = 0;
    for (int i = 0; i < lanes<T>; ++i) total += v[i];
    return total;
}

}  // namespace
}  // namespace platonic
