// The functions of simd_math.h and activation.h over arrays, so that tests can hold them to exact values.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace platonic {

enum class MathFunction { exp, expm1, tanh, activation, scalar_activation };

struct MathProbe {
    MathFunction function;
    int activation;  // the Activation where function is one, else ignored
    bool is_double;
    const void* x;  // [n] float or double
    void* y;        // [n] function of x
    int64_t n;
};

PLATONIC_FOR_EACH_ISA(void probe_math(const MathProbe&);)

}  // namespace platonic
