// How often each symbol occurs, once per instruction set.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "weight_compression/source.h"

namespace platonic {

// Up to so many levels, pairs of symbols are counted, in 16 bits each.
constexpr int64_t pair_levels = 512;
constexpr int64_t pair_stride = pair_levels + 32;
constexpr int64_t counter_bytes = 2 * pair_levels * pair_stride;

PLATONIC_FOR_EACH_ISA(
    // Adds the numbers of symbols of values [first, first + count) to counts[levels]. `counters`: counter_bytes of
    // zeros, aligned to 64, left as zeros.
    void count_symbols(const Values& x, const Quantization& z, int64_t first, int64_t count, int64_t* counts,
                       uint8_t* counters);)

}  // namespace platonic
