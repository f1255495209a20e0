// The uniform quantiser, operation by operation. R is the arithmetic: float for float16, bfloat16 and float32
// tensors, double for float64.
//
//   encode  t = (w * pre - low) * factor,  q = trunc(t)
//   decode  w' = (first + step * q) * post
//
// Every operation is rounded on its own. pre and post = 1 / pre are powers of two and 1 for all but extreme ranges:
// they keep hi - lo from overflowing and K / (hi - lo) from overflowing for ranges of denormals. `factor` is K / (hi -
// lo), lowered until w = hi lands in bin K - 1: rounding is monotone, so that every w of [lo, hi] gets 0 <= q <= K - 1
// without a comparison. Bins are counted from lo, as algorithm 2 of the thesis decodes them; its algorithm 1 counts
// from the top as printed, and puts w = min into bin 2^N, one beyond the last. Values decode to their bin's centre,
// so that |w - w'| <= (hi - lo) / (2K) up to the rounding of the operations above.
#pragma once

#include <cstdint>

#include "common/launch.h"

namespace platonic {

template <class R>
struct Quantizer {
    R pre, low, factor;
};

template <class R>
struct Dequantizer {
    R first, step, post;
};

// The minimum decides only where another thread changes the tensor while it is compressed: it keeps symbols inside of
// the tables. `last` = levels - 1.
template <class R>
PLATONIC_HD uint32_t symbol_of(const Quantizer<R>& z, uint32_t last, R w) {
    const uint32_t q = static_cast<uint32_t>(static_cast<int32_t>((w * z.pre - z.low) * z.factor));
    return q < last ? q : last;
}

template <class R>
PLATONIC_HD R value_of(const Dequantizer<R>& z, uint32_t q) {
    return (z.first + z.step * static_cast<R>(static_cast<int32_t>(q))) * z.post;
}

template <class R>
struct RealTraits;
template <>
struct RealTraits<float> {
    static constexpr double large = 0x1p126, tiny = 0x1p-60, lift = 0x1p64;
};
template <>
struct RealTraits<double> {
    static constexpr double large = 0x1p1022, tiny = 0x1p-500, lift = 0x1p512;
};

// The power of two that brings a range to where nothing overflows or underflows.
template <class R>
PLATONIC_HD double range_scale(double lo, double hi) {
    typedef RealTraits<R> Traits;
    if (hi >= Traits::large || lo <= -Traits::large) return 0.5;
    return hi - lo < Traits::tiny ? Traits::lift : 1.0;
}

// lo < hi, both finite and exact in R; 2 <= levels <= max_levels.
template <class R>
PLATONIC_HD Quantizer<R> make_quantizer(double lo, double hi, int64_t levels) {
    constexpr R unit = sizeof(R) == 4 ? R(0x1p-23) : R(0x1p-52);  // takes a unit in the last place or two
    Quantizer<R> z;
    z.pre = static_cast<R>(range_scale<R>(lo, hi));
    z.low = static_cast<R>(lo) * z.pre;
    const R range = static_cast<R>(hi) * z.pre - z.low;
    z.factor = static_cast<R>(static_cast<double>(levels) / static_cast<double>(range));
    while (static_cast<int64_t>(range * z.factor) >= levels) z.factor = z.factor - z.factor * unit;
    return z;
}

template <class R>
PLATONIC_HD Dequantizer<R> make_dequantizer(double lo, double hi, int64_t levels) {
    const double scale = range_scale<R>(lo, hi);
    const double low = lo * scale, step = (hi * scale - low) / static_cast<double>(levels);
    Dequantizer<R> z;
    z.first = static_cast<R>(low + step * 0.5);
    z.step = static_cast<R>(step);
    z.post = static_cast<R>(1.0 / scale);
    return z;
}

}  // namespace platonic
