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

// Counters of count_symbols: of pairs of symbols where the kernel counts those, 16 bits each.
constexpr int64_t pair_levels = 512;
constexpr int64_t pair_stride = pair_levels + 32;
constexpr int64_t counter_bytes = 2 * pair_levels * pair_stride + 128;

PLATONIC_FOR_EACH_ISA(Range value_range(const Values& x, int64_t first, int64_t count);

                      // `count` symbols from the values [first, first + count).
                      void quantize_chunk(const Values& x, const Quantization& z, int64_t first, int64_t count,
                                          uint16_t* symbols);

                      // Which of the values [first, first + count), at most 65,536, are below lo or above hi: their
                      // positions from `first` on, ascending, and how many.
                      int64_t find_outside(const Values& x, double lo, double hi, int64_t first, int64_t count,
                                           uint16_t* positions);

                      // Adds the numbers of symbols of values [first, first + count) to counts[levels]. `counters`:
                      // counter_bytes of zeros, aligned to 64, left as zeros.
                      void count_symbols(const Values& x, const Quantization& z, int64_t first, int64_t count,
                                         int64_t* counts, uint8_t* counters);

                      // Values [first, first + count) of the target from symbols.
                      void dequantize_chunk(const Target& out, const Dequantization& z, int64_t first, int64_t count,
                                            const uint16_t* symbols);)

}  // namespace platonic
