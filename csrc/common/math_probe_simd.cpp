#include "common/math_probe.h"
#include "common/simd_math.h"

namespace platonic {
namespace PLATONIC_ISA {
namespace {

template <class T>
vec_t<T> evaluate(const MathProbe& a, vec_t<T> x) {
    const Activation kind = static_cast<Activation>(a.activation);
    switch (a.function) {
        case MathFunction::exp:
            return exp(x);
        case MathFunction::expm1:
            return expm1(x);
        case MathFunction::tanh:
            return tanh(x);
        case MathFunction::activation:
            return activate_lanes<T>(kind, x);
        default:
            for (int i = 0; i < lanes<T>; ++i) x[i] = activate<T>(kind, x[i]);
            return x;
    }
}

template <class T>
void probe(const MathProbe& a) {
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    for (int64_t i = 0; i < a.n; i += lanes<T>) {
        const int64_t left = a.n - i < lanes<T> ? a.n - i : lanes<T>;
        T block[lanes<T>] = {};
        std::memcpy(block, x + i, left * sizeof(T));
        store(block, evaluate<T>(a, load(block)));
        std::memcpy(y + i, block, left * sizeof(T));
    }
}

}  // namespace

void probe_math(const MathProbe& a) { a.is_double ? probe<double>(a) : probe<float>(a); }

}  // namespace PLATONIC_ISA
}  // namespace platonic
