// CRC32C (Castagnoli polynomial, reflected, inverted at both ends): the checksum of headers and blocks.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace platonic {

PLATONIC_FOR_EACH_ISA(uint32_t crc32c(uint32_t crc, const uint8_t* bytes, int64_t size);)

// Of `size` bytes, continued from `crc` (0 at the start).
inline uint32_t crc32c(uint32_t crc, const uint8_t* bytes, int64_t size) {
    return PLATONIC_DISPATCH(crc32c(crc, bytes, size));
}

}  // namespace platonic
