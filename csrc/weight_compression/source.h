// What symbols are made from and what they become again: values and how they are quantised, or bytes of them.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "weight_compression/quantizer.h"

namespace platonic {

// The numbers are those of the payload's header; see FORMAT.md.
enum class DType : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

inline int64_t item_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

struct Values {
    DType dtype;  // where they are quantised
    const void* data;
    int64_t n;
};

// Symbols are one byte of every unit, an unsigned integer of `width` bytes: the one `shift` bits from its bottom, after
// the unit has been rotated to the left by one bit if `rotate`, which makes the exponent of a float its top.
struct Plane {
    int width, shift;  // width 0: no plane
    bool rotate;
};

// How values become `levels` symbols. `ranges`, if not null, has lo and hi, of the values' dtype, of every run of
// `group_size` values, and lo and hi are those of all; a group may be constant. `clamp`: there may be values beyond lo
// and hi, which get the outermost symbols.
struct Scheme {
    int64_t levels;
    double lo, hi;
    int64_t group_size;
    const void* ranges;
    bool clamp;
    Plane plane;
};

struct GroupRange {
    double lo, hi;
};

inline GroupRange group_range(const Scheme& scheme, DType dtype, int64_t group) {
    const auto both = [&](const auto* ranges, const auto& convert) {
        return GroupRange{convert(ranges[2 * group]), convert(ranges[2 * group + 1])};
    };
    const auto same = [](double x) { return x; };
    if (dtype == DType::float64) return both(static_cast<const double*>(scheme.ranges), same);
    if (dtype == DType::float32) return both(static_cast<const float*>(scheme.ranges), same);
    const uint16_t* bits = static_cast<const uint16_t*>(scheme.ranges);
    if (dtype == DType::float16) return both(bits, [](uint16_t h) { return double{half_to_float(h)}; });
    return both(bits, [](uint16_t b) { return double{bfloat_to_float(b)}; });
}

struct Quantization {
    Scheme scheme;
    Quantizer<float> single;  // dtypes but float64
    Quantizer<double> dual;   // float64

    // Whether a symbol is trunc((w - low) * factor) of the single quantiser, and nothing more.
    bool is_plain(DType dtype) const {
        return dtype == DType::float32 && scheme.plane.width == 0 && !scheme.ranges && !scheme.clamp && single.pre == 1;
    }
};

struct Dequantization {
    Scheme scheme;
    Dequantizer<float> single;
    Dequantizer<double> dual;

    bool is_plain(DType dtype) const {
        return dtype == DType::float32 && scheme.plane.width == 0 && !scheme.ranges && single.post == 1;
    }
};

inline Quantization make_quantization(DType dtype, const Scheme& scheme) {
    Quantization z{scheme, {1, 0, 0}, {1, 0, 0}};
    if (scheme.plane.width > 0 || scheme.ranges) return z;
    if (dtype == DType::float64)
        z.dual = make_quantizer<double>(scheme.lo, scheme.hi, scheme.levels);
    else
        z.single = make_quantizer<float>(scheme.lo, scheme.hi, scheme.levels);
    return z;
}

inline Dequantization make_dequantization(DType dtype, const Scheme& scheme) {
    Dequantization z{scheme, {0, 0, 1}, {0, 0, 1}};
    if (scheme.plane.width > 0 || scheme.ranges) return z;
    if (dtype == DType::float64)
        z.dual = make_dequantizer<double>(scheme.lo, scheme.hi, scheme.levels);
    else
        z.single = make_dequantizer<float>(scheme.lo, scheme.hi, scheme.levels);
    return z;
}

// What is done with decoded values: out = value, or out = out + scale * value, in the arithmetic of the dtype (float
// for 16-bit types) with every operation rounded on its own and the sum rounded to the dtype. The byte of a plane is
// put into its place of units that hold zeros there.
struct Target {
    DType dtype;
    void* data;
    bool accumulate;
    double scale;
};

}  // namespace platonic
