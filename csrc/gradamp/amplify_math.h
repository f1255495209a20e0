// The activations y(x) and the losses whose gradient is y - t, for numbers and for vectors of them.
//
//   exp     y = a e^x         loss |y| - t ln y                  (thesis, section 4.6)
//   pow3    y = a x^3 + b     loss a x^4 / 4 + b x - t x         (section 4.8, whose y is x here)
//   linear  y = x             loss (x - t)^2 / 2
//
// Above max_input m, exp goes on as the line a e^m (1 + x - m), and its loss as that line's integral
// a e^m (1 + (x - m) + (x - m)^2 / 2): value, slope and second derivative are continuous. Where t = 0 the term in
// ln y is 0 even at x = -infinity, so that masked logits cost nothing.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/launch.h"

namespace platonic {

enum class Amplifier { exp, pow3, linear };

template <class A>
struct AmplifierSettings {
    A alpha, beta, log_alpha, max_input;
};

// What amplify_element needs to compute with V, here one number of type A; amplify_lanes.h has the twin for vectors. A
// minimum or maximum is its second argument where that is NaN.
template <class A>
struct NumberMath {
    typedef A number;
    typedef A V;
    static constexpr A largest = std::is_same<A, double>::value ? A(1.7976931348623157e308) : A(3.402823466e38f);
    static PLATONIC_HD float scaled_exp(float x, float alpha) { return alpha * ::expf(x); }
    static PLATONIC_HD double scaled_exp(double x, double alpha) { return alpha * ::exp(x); }
    static PLATONIC_HD A min(A a, A b) { return a < b ? a : b; }
    static PLATONIC_HD A max(A a, A b) { return a > b ? a : b; }
    static PLATONIC_HD A splat(A x) { return x; }
    static PLATONIC_HD bool any_above(A x, A limit) { return x > limit; }
};

// y(x), and the loss of one element. zero_target: t is 0 (in every lane).
template <class M, Amplifier amplifier, bool zero_target = false>
PLATONIC_HD typename M::V amplify_element(typename M::V x, typename M::V t,
                                          const AmplifierSettings<typename M::number>& s, typename M::V& loss) {
    typedef typename M::number A;
    typedef typename M::V V;
    if constexpr (amplifier == Amplifier::exp) {
        V y = M::scaled_exp(M::min(M::splat(s.max_input), x), s.alpha);
        loss = y;
        if (M::any_above(x, s.max_input)) {
            const V beyond = M::max(M::splat(A(0)), x - s.max_input), line = y * beyond;
            y = y + line;
            loss = y + (A(0.5) * beyond) * line;
        }
        // x is kept finite, so that t = 0 makes the term 0 by multiplication, at -infinity too.
        if (!zero_target) loss = loss - t * (M::max(M::splat(-M::largest), x) + s.log_alpha);
        return y;
    } else if constexpr (amplifier == Amplifier::pow3) {
        const V cube = s.alpha * x * x * x;
        loss = x * (A(0.25) * cube + (s.beta - t));
        return cube + s.beta;
    } else {
        const V error = x - t;
        loss = A(0.5) * error * error;
        return x;
    }
}

}  // namespace platonic
