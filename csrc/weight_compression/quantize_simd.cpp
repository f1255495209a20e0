// Ranges; symbols from values or from their bytes, and back; values beyond a range. Loops over plain arrays are left to
// the compiler's vectoriser; what it cannot see (minima with NaN) is written out.
#include "weight_compression/quantize_simd.h"

#include <cstring>
#include <type_traits>

#include "common/half.h"
#include "common/simd.h"

namespace platonic {
namespace PLATONIC_ISA {
namespace {

constexpr int64_t chunk = 1024;

// Up to `chunk` values of a 16-bit type as floats.
void load_floats(const Values& x, int64_t first, int64_t count, float* out) {
    const uint16_t* in = static_cast<const uint16_t*>(x.data) + first;
    if (x.dtype == DType::float16)
        for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(in[i]);
    else
        for (int64_t i = 0; i < count; ++i) out[i] = bfloat_to_float(in[i]);
}

// ---- ranges ----

template <class T>
struct Bits;
template <>
struct Bits<float> {
    typedef uint32_t type;
    static constexpr uint32_t magnitude = 0x7fffffffu, infinity = 0x7f800000u;
};
template <>
struct Bits<double> {
    typedef uint64_t type;
    static constexpr uint64_t magnitude = 0x7fffffffffffffffull, infinity = 0x7ff0000000000000ull;
};

template <class T>
Range range_of(const T* x, int64_t count) {
    typedef typename Bits<T>::type U;
    typedef U vbits __attribute__((vector_size(PLATONIC_VECTOR_BYTES)));
    constexpr int n = lanes<T>, chains = 4;
    const T infinity = static_cast<T>(__builtin_inf());
    vec_t<T> lo[chains], hi[chains];
    vbits special[chains];
    for (int c = 0; c < chains; ++c) {
        lo[c] = splat<T>(infinity);
        hi[c] = splat<T>(-infinity);
        special[c] = vbits{};
    }
    const auto take = [&](int c, vec_t<T> v) {
        lo[c] = min(v, lo[c]);  // the second operand where the first is NaN
        hi[c] = max(v, hi[c]);
        const vbits bits = (vbits)v & (vbits{} + Bits<T>::magnitude);
        special[c] |= (vbits)(bits >= (vbits{} + Bits<T>::infinity));
    };
    int64_t i = 0;
    for (; i + chains * n <= count; i += chains * n) {
        __builtin_prefetch(x + i + 2048 / sizeof(T));
        if (chains * n * sizeof(T) > 64) __builtin_prefetch(x + i + 2048 / sizeof(T) + 64 / sizeof(T));
        if (chains * n * sizeof(T) > 128) {
            __builtin_prefetch(x + i + 2048 / sizeof(T) + 128 / sizeof(T));
            __builtin_prefetch(x + i + 2048 / sizeof(T) + 192 / sizeof(T));
        }
        for (int c = 0; c < chains; ++c) take(c, load<T>(x + i + c * n));
    }
    Range range{static_cast<double>(infinity), -static_cast<double>(infinity), true};
    for (; i < count; ++i) {
        const T v = x[i];
        if (!(v - v == 0)) range.finite = false;
        if (v < range.lo) range.lo = v;
        if (v > range.hi) range.hi = v;
    }
    for (int c = 0; c < chains; ++c) {
        for (int l = 0; l < n; ++l) {
            if (lo[c][l] < range.lo) range.lo = lo[c][l];
            if (hi[c][l] > range.hi) range.hi = hi[c][l];
            if (special[c][l]) range.finite = false;
        }
    }
    return range;
}

// ---- symbols ----

template <bool clamp, class R>
PLATONIC_INLINE void quantize_all(const Quantizer<R>& z, const Scheme& scheme, const R* x, int64_t count,
                                  uint16_t* symbols) {
    const uint32_t last = static_cast<uint32_t>(scheme.levels - 1);
    const R lo = static_cast<R>(scheme.lo), hi = static_cast<R>(scheme.hi);
    for (int64_t i = 0; i < count; ++i) {
        R w = x[i];
        if (clamp) {
            w = w < lo ? lo : w;
            w = w > hi ? hi : w;
        }
        symbols[i] = static_cast<uint16_t>(symbol_of(z, last, w));
    }
}

// Calls run(group, begin, end) for every part of [first, first + count) that lies in one group.
template <class F>
PLATONIC_INLINE void for_each_group(const Scheme& scheme, int64_t first, int64_t count, const F& run) {
    for (int64_t i = first; i < first + count;) {
        const int64_t group = i / scheme.group_size, end = (group + 1) * scheme.group_size;
        const int64_t stop = end < first + count ? end : first + count;
        run(group, i, stop);
        i = stop;
    }
}

// x[0] is value number `first` of the tensor.
template <class R>
PLATONIC_INLINE void quantize_values(const Quantizer<R>& z, const Scheme& scheme, DType dtype, const R* x,
                                     int64_t first, int64_t count, uint16_t* symbols) {
    if (scheme.ranges) {
        for_each_group(scheme, first, count, [&](int64_t group, int64_t begin, int64_t end) {
            const GroupRange range = group_range(scheme, dtype, group);
            const int64_t at = begin - first, size = end - begin;
            if (range.lo == range.hi) return static_cast<void>(memset(symbols + at, 0, size * sizeof *symbols));
            const Quantizer<R> own = make_quantizer<R>(range.lo, range.hi, scheme.levels);
            quantize_all<false>(own, scheme, x + at, size, symbols + at);
        });
    } else if (scheme.clamp) {
        quantize_all<true>(z, scheme, x, count, symbols);
    } else {
        quantize_all<false>(z, scheme, x, count, symbols);
    }
}

// ---- planes of bytes ----

template <class U>
PLATONIC_INLINE U rotate_left(U u, int bits) {
    return static_cast<U>(u << bits | u >> (8 * sizeof(U) - bits));
}

template <class U, class S>
PLATONIC_INLINE void take_plane(const U* x, const Plane& plane, int64_t count, S* symbols) {
    if (plane.rotate)
        for (int64_t i = 0; i < count; ++i) symbols[i] = rotate_left(x[i], 1) >> plane.shift & 255;
    else
        for (int64_t i = 0; i < count; ++i) symbols[i] = x[i] >> plane.shift & 255;
}

template <class U, class S>
PLATONIC_INLINE void put_plane(U* y, const Plane& plane, int64_t count, const S* symbols) {
    const int up = plane.rotate ? static_cast<int>(8 * sizeof(U)) - 1 : 0;
    if (up)
        for (int64_t i = 0; i < count; ++i)
            y[i] = static_cast<U>(y[i] | rotate_left(static_cast<U>(static_cast<U>(symbols[i]) << plane.shift), up));
    else
        for (int64_t i = 0; i < count; ++i)
            y[i] = static_cast<U>(y[i] | static_cast<U>(static_cast<U>(symbols[i]) << plane.shift));
}

// Calls run(a null pointer of the unit's type).
template <class F>
PLATONIC_INLINE void with_unit(int width, const F& run) {
    if (width == 1) return run(static_cast<uint8_t*>(nullptr));
    if (width == 2) return run(static_cast<uint16_t*>(nullptr));
    if (width == 4) return run(static_cast<uint32_t*>(nullptr));
    run(static_cast<uint64_t*>(nullptr));
}

}  // namespace

Range value_range(const Values& x, int64_t first, int64_t count) {
    Range range{0, 0, true};
    if (x.dtype == DType::float32) {
        range = range_of(static_cast<const float*>(x.data) + first, count);
    } else if (x.dtype == DType::float64) {
        range = range_of(static_cast<const double*>(x.data) + first, count);
    } else {
        float values[chunk];
        for (int64_t i = 0; i < count; i += chunk) {
            const int64_t size = count - i < chunk ? count - i : chunk;
            load_floats(x, first + i, size, values);
            const Range part = range_of(values, size);
            if (i == 0 || part.lo < range.lo) range.lo = part.lo;
            if (i == 0 || part.hi > range.hi) range.hi = part.hi;
            range.finite = range.finite && part.finite;
        }
    }
    range.lo = range.lo + 0.0;  // -0 becomes 0: which of them comes first must not show
    range.hi = range.hi + 0.0;
    return range;
}

void quantize_chunk(const Values& x, const Quantization& z, int64_t first, int64_t count, uint16_t* symbols) {
    const Scheme& scheme = z.scheme;
    if (scheme.plane.width > 0) {
        return with_unit(scheme.plane.width, [&](auto* unit) {
            take_plane(static_cast<decltype(unit)>(const_cast<void*>(x.data)) + first, scheme.plane, count, symbols);
        });
    }
    if (x.dtype == DType::float32)
        return quantize_values(z.single, scheme, x.dtype, static_cast<const float*>(x.data) + first, first, count,
                               symbols);
    if (x.dtype == DType::float64)
        return quantize_values(z.dual, scheme, x.dtype, static_cast<const double*>(x.data) + first, first, count,
                               symbols);
    float values[chunk];
    for (int64_t i = 0; i < count; i += chunk) {
        const int64_t size = count - i < chunk ? count - i : chunk;
        load_floats(x, first + i, size, values);
        quantize_values(z.single, scheme, x.dtype, values, first + i, size, symbols + i);
    }
}

namespace {

template <class R>
PLATONIC_INLINE void dequantize_values(const Target& out, const Dequantizer<R>& z, int64_t first, int64_t count,
                                       const uint16_t* symbols) {
    const R scale = static_cast<R>(out.scale);
    if (sizeof(R) == 8 || out.dtype == DType::float32) {
        R* y = static_cast<R*>(out.data) + first;
        if (out.accumulate)
            for (int64_t i = 0; i < count; ++i) y[i] = y[i] + scale * value_of(z, symbols[i]);
        else
            for (int64_t i = 0; i < count; ++i) y[i] = value_of(z, symbols[i]);
        return;
    }
    // A 16-bit target's value is rounded to the dtype before it is added, as if it had been stored.
    uint16_t* y = static_cast<uint16_t*>(out.data) + first;
    if (out.dtype == DType::float16) {
        if (out.accumulate)
            for (int64_t i = 0; i < count; ++i)
                y[i] =
                    float_to_half(half_to_float(y[i]) + scale * half_to_float(float_to_half(value_of(z, symbols[i]))));
        else
            for (int64_t i = 0; i < count; ++i) y[i] = float_to_half(value_of(z, symbols[i]));
    } else {
        if (out.accumulate)
            for (int64_t i = 0; i < count; ++i)
                y[i] = float_to_bfloat(bfloat_to_float(y[i]) +
                                       scale * bfloat_to_float(float_to_bfloat(value_of(z, symbols[i]))));
        else
            for (int64_t i = 0; i < count; ++i) y[i] = float_to_bfloat(value_of(z, symbols[i]));
    }
}

template <class R>
PLATONIC_INLINE void dequantize_groups(const Target& out, const Scheme& scheme, int64_t first, int64_t count,
                                       const uint16_t* symbols) {
    for_each_group(scheme, first, count, [&](int64_t group, int64_t begin, int64_t end) {
        const GroupRange range = group_range(scheme, out.dtype, group);
        const Dequantizer<R> z = range.lo == range.hi ? Dequantizer<R>{static_cast<R>(range.lo), 0, 1}
                                                      : make_dequantizer<R>(range.lo, range.hi, scheme.levels);
        dequantize_values(out, z, begin, end - begin, symbols + (begin - first));
    });
}

}  // namespace

void dequantize_chunk(const Target& out, const Dequantization& z, int64_t first, int64_t count,
                      const uint16_t* symbols) {
    const Scheme& scheme = z.scheme;
    if (scheme.plane.width > 0)
        with_unit(scheme.plane.width, [&](auto* unit) {
            put_plane(static_cast<decltype(unit)>(out.data) + first, scheme.plane, count, symbols);
        });
    else if (scheme.ranges && out.dtype == DType::float64)
        dequantize_groups<double>(out, scheme, first, count, symbols);
    else if (scheme.ranges)
        dequantize_groups<float>(out, scheme, first, count, symbols);
    else if (out.dtype == DType::float64)
        dequantize_values(out, z.dual, first, count, symbols);
    else
        dequantize_values(out, z.single, first, count, symbols);
}

void take_bytes(const void* units, const Plane& plane, int64_t first, int64_t count, uint8_t* bytes) {
    with_unit(plane.width, [&](auto* unit) {
        take_plane(static_cast<decltype(unit)>(const_cast<void*>(units)) + first, plane, count, bytes);
    });
}

void put_bytes(void* units, const Plane& plane, int64_t first, int64_t count, const uint8_t* bytes) {
    with_unit(plane.width,
              [&](auto* unit) { put_plane(static_cast<decltype(unit)>(units) + first, plane, count, bytes); });
}

int64_t find_outside(const Values& x, double lo, double hi, int64_t first, int64_t count, uint16_t* positions) {
    int64_t found = 0;
    const auto search = [&](const auto* values, int64_t begin, int64_t size) {
        typedef std::decay_t<decltype(*values)> R;
        const R low = static_cast<R>(lo), high = static_cast<R>(hi);
        constexpr int64_t step = 64;
        for (int64_t i = 0; i < size; i += step) {
            const int64_t end = i + step < size ? i + step : size;
            int any = 0;
            for (int64_t k = i; k < end; ++k) any |= (values[k] < low) | (values[k] > high);
            if (any == 0) continue;
            for (int64_t k = i; k < end; ++k)
                if (values[k] < low || values[k] > high) positions[found++] = static_cast<uint16_t>(begin + k);
        }
    };
    if (x.dtype == DType::float32) {
        search(static_cast<const float*>(x.data) + first, 0, count);
    } else if (x.dtype == DType::float64) {
        search(static_cast<const double*>(x.data) + first, 0, count);
    } else {
        float values[chunk];
        for (int64_t i = 0; i < count; i += chunk) {
            const int64_t size = count - i < chunk ? count - i : chunk;
            load_floats(x, first + i, size, values);
            search(values, i, size);
        }
    }
    return found;
}

}  // namespace PLATONIC_ISA
}  // namespace platonic
