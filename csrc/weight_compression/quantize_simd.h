// From values to symbols and back, once per instruction set.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "weight_compression/source.h"

namespace platonic {

struct Range {
    double lo, hi;  // of the values that are numbers
    bool finite;    // no NaN, no infinity
};

PLATONIC_FOR_EACH_ISA(
    Range value_range(const Values& x, int64_t first, int64_t count);

    // `count` symbols from the values [first, first + count).
    void quantize_chunk(const Values& x, const Quantization& z, int64_t first, int64_t count, uint16_t* symbols);

    // Which of the values [first, first + count), at most 65,536, are below lo or above hi: their
    // positions from `first` on, ascending, and how many.
    int64_t find_outside(const Values& x, double lo, double hi, int64_t first, int64_t count, uint16_t* positions);

    // Values [first, first + count) of the target from symbols.
    void dequantize_chunk(const Target& out, const Dequantization& z, int64_t first, int64_t count,
                          const uint16_t* symbols);

    // The bytes of a plane of units [first, first + count), and back: into units that hold zeros in
    // their place.
    void take_bytes(const void* units, const Plane& plane, int64_t first, int64_t count, uint8_t* bytes);
    void put_bytes(void* units, const Plane& plane, int64_t first, int64_t count, const uint8_t* bytes);)

}  // namespace platonic
