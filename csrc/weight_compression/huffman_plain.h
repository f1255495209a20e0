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

PLATONIC_INLINE void decode_rows_plain(const DecodeTables& tables, DecodePair& pair, int half, int64_t rows) {
    uint32_t bits[stream_lanes];
    int32_t fill[stream_lanes];
    for (int l = 0; l < stream_lanes; ++l) {
        bits[l] = static_cast<uint32_t>(pair.state.top[2 * l + half]) << 16 | pair.state.low[2 * l + half];
        fill[l] = pair.state.fill[2 * l + half];
    }
    const uint8_t* next = pair.next[half];
    uint16_t* out = pair.symbols[half];
    const int shift = 32 - tables.code.longest;
    for (int64_t row = 0; row < rows; ++row, out += stream_lanes) {
        for (int l = 0; l < stream_lanes; ++l) {
            const uint32_t entry = tables.entries[bits[l] >> shift];
            const int length = entry & 15;
            out[l] = static_cast<uint16_t>(entry >> 4);
            bits[l] <<= length;
            fill[l] -= length;
            // Without a branch, which nothing could predict.
            const int32_t wanted = fill[l] >> 31;
            fill[l] &= 15;
            bits[l] |= (word_at(next) << 16 >> fill[l]) & static_cast<uint32_t>(wanted);
            next -= 2 * wanted;
        }
    }
    for (int l = 0; l < stream_lanes; ++l) {
        pair.state.top[2 * l + half] = static_cast<uint16_t>(bits[l] >> 16);
        pair.state.low[2 * l + half] = static_cast<uint16_t>(bits[l]);
        pair.state.fill[2 * l + half] = static_cast<uint16_t>(fill[l]);
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
        for (int l = stream_lanes - 1; l >= 0; --l) {
            const uint32_t entry = tables.codes[symbols[l]];
            const int length = static_cast<int>(entry >> 16);
            *next = (bits[l] & 0xffff) << place;
            const int full = fill[l] + length >= 32 ? 16 : 0;
            next += full / 16;
            bits[l] = bits[l] >> full | (entry & 0xffff) << (fill[l] - full);
            fill[l] += length - full;
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
