// The activations of hidden layers, for CPU and CUDA kernels alike: an enum, its names, and scalar functions.
// Vector versions for the CPU are in simd_math.h; celu has alpha = 1, so it equals elu.
#pragma once

#include "common/launch.h"

namespace platonic {

enum class Activation { identity, relu, abs, tanh, celu };

constexpr int activation_count = 5;

// Indexed by the enum. bindings.cpp hands them to Python, which passes the enum's integer to the kernels.
constexpr const char* activation_names[activation_count] = {"identity", "relu", "abs", "tanh", "celu"};

namespace scalar_math {

#if defined(__CUDACC__)
PLATONIC_HD float tanh(float x) { return ::tanhf(x); }
PLATONIC_HD double tanh(double x) { return ::tanh(x); }
PLATONIC_HD float expm1(float x) { return ::expm1f(x); }
PLATONIC_HD double expm1(double x) { return ::expm1(x); }
#else
PLATONIC_HD float tanh(float x) { return __builtin_tanhf(x); }
PLATONIC_HD double tanh(double x) { return __builtin_tanh(x); }
PLATONIC_HD float expm1(float x) { return __builtin_expm1f(x); }
PLATONIC_HD double expm1(double x) { return __builtin_expm1(x); }
#endif

}  // namespace scalar_math

// act(x) of one float or double. NaN gives NaN for every activation.
template <class T>
PLATONIC_HD T activate(Activation kind, T x) {
    switch (kind) {
        case Activation::relu:
            return x < T(0) ? T(0) : x;
        case Activation::abs:
            return x < T(0) ? -x : x;
        case Activation::tanh:
            return scalar_math::tanh(x);
        case Activation::celu:
            return x > T(0) ? x : scalar_math::expm1(x);
        default:
            return x;
    }
}

}  // namespace platonic
