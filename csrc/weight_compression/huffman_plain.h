// The entropy coder's rows lane by lane, with tables in memory. Part of huffman_simd.cpp.
#pragma once

#include <cstring>

#include "common/simd.h"
#include "weight_compression/huffman_simd.h"

namespace platonic {
namespace PLATONIC_ISA {
namespace {

PLATONIC_INLINE uint32_t word_at(const uint8_t* p) {
    uint16_t word;
    memcpy(&word, p, 2);
    return word;
}

// A lane's bits are the lowest of `bits`, below whatever has been decoded. One shift by a variable count a symbol: they
// take three instructions without BMI2.
PLATONIC_INLINE void decode_rows_plain(const DecodeTables& tables, DecodePair& pair, int half, int64_t rows) {
    const int longest = tables.code.longest, full = 16 - longest;
    const uint32_t mask = (1u << longest) - 1;
    uint32_t bits[stream_lanes];
    int32_t below[stream_lanes];  // bits below the next `longest`
    for (int l = 0; l < stream_lanes; ++l) {
        const int32_t fill = pair.state.fill[2 * l + half];
        bits[l] = static_cast<uint32_t>(pair.state.top[2 * l + half]) << fill |
                  static_cast<uint32_t>(pair.state.low[2 * l + half]) >> (16 - fill);
        below[l] = full + fill;
    }
    const uint8_t* next = pair.next[half];
    uint16_t* out = pair.symbols[half];
    for (int64_t row = 0; row < rows; ++row, out += stream_lanes) {
#pragma GCC unroll 16
        for (int l = 0; l < stream_lanes; ++l) {
            const uint32_t entry = tables.entries[bits[l] >> below[l] & mask];
            out[l] = static_cast<uint16_t>(entry >> 4);
            const int32_t left = below[l] - static_cast<int32_t>(entry & 15);
            // Without a branch, which nothing could predict.
            const int32_t due = (left - full) >> 31;
            bits[l] ^= (bits[l] ^ (bits[l] << 16 | word_at(next))) & static_cast<uint32_t>(due);
            below[l] = left + (due & 16);
            next -= 2 * due;
        }
    }
    for (int l = 0; l < stream_lanes; ++l) {
        const int32_t fill = below[l] - full;
        const uint32_t aligned = bits[l] << (16 - fill);
        pair.state.top[2 * l + half] = static_cast<uint16_t>(aligned >> 16);
        pair.state.low[2 * l + half] = static_cast<uint16_t>(aligned);
        pair.state.fill[2 * l + half] = static_cast<uint16_t>(fill);
    }
    pair.next[half] = next;
}

PLATONIC_INLINE void encode_rows_plain(const EncodeTables& tables, EncodePair& pair, int half, int64_t rows) {
    uint32_t bits[stream_lanes];
    int32_t fill[stream_lanes];
    for (int l = 0; l < stream_lanes; ++l) {
        bits[l] = static_cast<uint32_t>(pair.state.top[2 * l + half]) << 16 | pair.state.low[2 * l + half];
        fill[l] = pair.state.fill[2 * l + half] + 16;
    }
    uint32_t* next = pair.next[half];
    const uint16_t* symbols = pair.symbols[half];
    const int place = 16 * half;
    for (int64_t row = 0; row < rows; ++row) {
        symbols -= stream_lanes;
#pragma GCC unroll 16
        for (int l = stream_lanes - 1; l >= 0; --l) {
            const uint32_t entry = tables.codes[symbols[l]];
            *next = (bits[l] & 0xffff) << place;
            const uint64_t merged = bits[l] | static_cast<uint64_t>(entry & 0xffff) << fill[l];
            const int32_t more = fill[l] + static_cast<int32_t>(entry >> 16);
            const bool full = more >= 32;
            bits[l] = static_cast<uint32_t>(full ? merged >> 16 : merged);
            fill[l] = more - 16 * full;
            next += full;
        }
    }
    for (int l = 0; l < stream_lanes; ++l) {
        pair.state.top[2 * l + half] = static_cast<uint16_t>(bits[l] >> 16);
        pair.state.low[2 * l + half] = static_cast<uint16_t>(bits[l]);
        pair.state.fill[2 * l + half] = static_cast<uint16_t>(fill[l] - 16);
    }
    pair.next[half] = next;
}

}  // namespace
}  // namespace PLATONIC_ISA
}  // namespace platonic
