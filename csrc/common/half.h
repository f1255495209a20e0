// 16-bit floating point, in integer operations: exact, and the same everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/launch.h"

namespace platonic {

PLATONIC_HD float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
PLATONIC_HD uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

PLATONIC_HD float half_to_float(uint16_t h) {
    const float magnitude = from_bits(static_cast<uint32_t>(h & 0x7fff) << 13) * 0x1p112f;
    const uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    return from_bits(to_bits(magnitude) | special | static_cast<uint32_t>(h & 0x8000) << 16);
}

// Rounded to nearest, ties to even.
PLATONIC_HD uint16_t float_to_half(float x) {
    const uint32_t bits = to_bits(x) & 0x7fffffff, sign = to_bits(x) >> 16 & 0x8000;
    const uint32_t normal = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
    const uint32_t small = to_bits(from_bits(bits) + 0.5f) - 0x3f000000u;
    uint32_t half = bits < 0x38800000u ? small : normal;
    half = bits >= 0x477ff000u ? 0x7c00u : half;
    half = bits > 0x7f800000u ? 0x7e00u : half;
    return static_cast<uint16_t>(half | sign);
}

PLATONIC_HD float bfloat_to_float(uint16_t b) { return from_bits(static_cast<uint32_t>(b) << 16); }

PLATONIC_HD uint16_t float_to_bfloat(float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000u ? (bits >> 16 | 0x40) : rounded);
}

}  // namespace platonic
