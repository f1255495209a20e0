// exp, expm1, tanh and the activations on vectors, float and double, lane by lane, for *_simd.cpp files.
//
// Errors against the exact value (python_tests/test_simd_math.py holds them): exp 2 ulp, expm1 and tanh 4 ulp.
// NaN gives NaN; overflow gives infinity; subnormal results of exp are rounded, not flushed.
#pragma once

#include "common/activation.h"
#include "common/simd.h"

namespace platonic {
namespace {

// Constants by element type. `magic` = 1.5 * 2^mantissa_bits: adding it rounds to an integer that then stands in the
// low bits. ln2_hi has trailing zero bits, so that n * ln2_hi is exact for every n that occurs. exp_low is where exp
// has rounded to 0, expm1_low where expm1 has rounded to -1, exp_high where both have overflowed.
template <class T>
struct MathConstants;
template <>
struct MathConstants<float> {
    static constexpr float magic = 12582912.0f, ln2_hi = 0x1.62e4p-1f, ln2_lo = 0x1.7f7d1cf79abcap-20f;
    static constexpr float exp_low = -104.0f, expm1_low = -20.0f, exp_high = 89.0f;
    static constexpr int32_t magic_bits = 0x4b400000, mantissa = 23, bias = 127, sign_bit = INT32_MIN;
};
template <>
struct MathConstants<double> {
    static constexpr double magic = 6755399441055744.0, ln2_hi = 0x1.62e42fefap-1, ln2_lo = 0x1.cf79abc9e3b3ap-40;
    static constexpr double exp_low = -746.0, expm1_low = -40.0, exp_high = 710.0;
    static constexpr int64_t magic_bits = 0x4338000000000000, mantissa = 52, bias = 1023, sign_bit = INT64_MIN;
};

// 2^n for exponents n of normal numbers.
template <class T>
PLATONIC_INLINE vec_t<T> power_of_two(typename Simd<T>::ivec n) {
    typedef MathConstants<T> K;
    return (vec_t<T>)((n + K::bias) << K::mantissa);
}

// x = n ln 2 + r with n an integer and |r| <= (ln 2) / 2. Returns r.
template <class T>
PLATONIC_INLINE vec_t<T> reduce_exponent(vec_t<T> x, typename Simd<T>::ivec& n) {
    typedef MathConstants<T> K;
    const vec_t<T> shifted = x * T(1.4426950408889634074) + K::magic;
    n = (typename Simd<T>::ivec)shifted - K::magic_bits;
    const vec_t<T> whole = shifted - K::magic;
    return (x - whole * K::ln2_hi) - whole * K::ln2_lo;
}

// (e^r - 1 - r) / r^2 by Taylor's series; the first term left out is below 2^-26 (float) and 2^-56 (double) of
// e^r for |r| <= 0.35.
PLATONIC_INLINE vfloat exp_tail(vfloat r) {
    vfloat q = splat<float>(1.0f / 5040);
    q = q * r + 1.0f / 720;
    q = q * r + 1.0f / 120;
    q = q * r + 1.0f / 24;
    q = q * r + 1.0f / 6;
    return q * r + 0.5f;
}
PLATONIC_INLINE vdouble exp_tail(vdouble r) {
    vdouble q = splat<double>(1.0 / 6227020800);
    q = q * r + 1.0 / 479001600;
    q = q * r + 1.0 / 39916800;
    q = q * r + 1.0 / 3628800;
    q = q * r + 1.0 / 362880;
    q = q * r + 1.0 / 40320;
    q = q * r + 1.0 / 5040;
    q = q * r + 1.0 / 720;
    q = q * r + 1.0 / 120;
    q = q * r + 1.0 / 24;
    q = q * r + 1.0 / 6;
    return q * r + 0.5;
}

// Comparisons with NaN are false: it passes through.
template <class T>
PLATONIC_INLINE vec_t<T> clamp_exponent(vec_t<T> x, T low) {
    const vec_t<T> high = splat<T>(MathConstants<T>::exp_high), floor = splat<T>(low);
    x = x > high ? high : x;
    return x < floor ? floor : x;
}

template <class T>
PLATONIC_INLINE vec_t<T> exp_of(vec_t<T> x) {
    typename Simd<T>::ivec n;
    const vec_t<T> r = reduce_exponent<T>(clamp_exponent<T>(x, MathConstants<T>::exp_low), n);
    const vec_t<T> p = (r + r * r * exp_tail(r)) + T(1);
    // In two steps, since 2^n alone may be subnormal or infinite.
    const typename Simd<T>::ivec half = n >> 1;
    return p * power_of_two<T>(half) * power_of_two<T>(n - half);
}

// e^x - 1 = 2 (2^(n-1) (e^r - 1) + (2^(n-1) - 1/2)); the power is halved because 2^n may be infinite.
template <class T>
PLATONIC_INLINE vec_t<T> expm1_of(vec_t<T> x) {
    typename Simd<T>::ivec n;
    const vec_t<T> r = reduce_exponent<T>(clamp_exponent<T>(x, MathConstants<T>::expm1_low), n);
    const vec_t<T> p = r + r * r * exp_tail(r);
    const vec_t<T> scale = power_of_two<T>(n - 1);
    return T(2) * (p * scale + (scale - T(0.5)));
}

// tanh |x| = -e / (2 + e) with e = expm1(-2 |x|), which cancels nowhere; the sign of x replaces the quotient's.
template <class T>
PLATONIC_INLINE vec_t<T> tanh_of(vec_t<T> x) {
    typedef typename Simd<T>::ivec ivec;
    const ivec sign = (ivec)x & MathConstants<T>::sign_bit;
    const vec_t<T> e = expm1_of<T>(T(-2) * (vec_t<T>)((ivec)x ^ sign));
    return (vec_t<T>)(((ivec)(e / (T(2) + e)) & ~MathConstants<T>::sign_bit) | sign);
}

PLATONIC_INLINE vfloat exp(vfloat x) { return exp_of<float>(x); }
PLATONIC_INLINE vdouble exp(vdouble x) { return exp_of<double>(x); }
PLATONIC_INLINE vfloat expm1(vfloat x) { return expm1_of<float>(x); }
PLATONIC_INLINE vdouble expm1(vdouble x) { return expm1_of<double>(x); }
PLATONIC_INLINE vfloat tanh(vfloat x) { return tanh_of<float>(x); }
PLATONIC_INLINE vdouble tanh(vdouble x) { return tanh_of<double>(x); }

// act(x) with the activation fixed at compile time; activate_lanes<T>(kind, x) chooses at run time.
template <Activation kind, class T>
PLATONIC_INLINE vec_t<T> activate_as(vec_t<T> x) {
    const vec_t<T> zero = {};
    if (kind == Activation::relu) return x < zero ? zero : x;
    if (kind == Activation::abs) return x < zero ? -x : x;
    if (kind == Activation::tanh) return tanh_of<T>(x);
    if (kind == Activation::celu) return x > zero ? x : expm1_of<T>(x);
    return x;
}

template <class T>
PLATONIC_INLINE vec_t<T> activate_lanes(Activation kind, vec_t<T> x) {
    switch (kind) {
        case Activation::relu:
            return activate_as<Activation::relu, T>(x);
        case Activation::abs:
            return activate_as<Activation::abs, T>(x);
        case Activation::tanh:
            return activate_as<Activation::tanh, T>(x);
        case Activation::celu:
            return activate_as<Activation::celu, T>(x);
        default:
            return x;
    }
}

}  // namespace
}  // namespace platonic
