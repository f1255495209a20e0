// Symbols of a fixed number of bits, 1 to 16, to bytes and back, once per instruction set. Bit i * bits begins symbol
// i, least significant bit first, so that 8 symbols take `bits` bytes.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace platonic {

PLATONIC_FOR_EACH_ISA(
    // Writes exactly (count * bits + 7) / 8 bytes. Symbols have no more than `bits` bits.
    void pack_fixed(const uint16_t* symbols, int64_t count, int bits, uint8_t* out);

    // Reads exactly as many, and returns the largest symbol.
    uint32_t unpack_fixed(const uint8_t* in, int64_t count, int bits, uint16_t* symbols);)

}  // namespace platonic
