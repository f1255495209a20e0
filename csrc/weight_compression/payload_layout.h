// Where the fields of a payload's header lie; see weight_compression/FORMAT.md and payload.py, which write the same.
#pragma once

#include <cstdint>
#include <cstring>

#include "weight_compression/codec.h"
#include "weight_compression/stream.h"

namespace platonic {

enum class Mode : int { raw = 0, constant = 1, fixed = 2, entropy = 3 };

constexpr uint32_t payload_magic = 0x43574c50;  // "PLWC"
constexpr int payload_version = 0;
constexpr int max_dimensions = 64;
constexpr int64_t raw_block_bytes = 1 << 18;
constexpr int64_t start_bytes = 16, quantiser_bytes = 28, table_entry_bytes = 8;

struct Shape {
    int dimensions;
    int64_t sizes[max_dimensions];
};

// Of n elements of `item` bytes.
PLATONIC_HD int64_t payload_blocks(Mode mode, int64_t n, int64_t item) {
    if (mode == Mode::constant) return 0;
    if (mode == Mode::raw) return n * item / raw_block_bytes + (n * item % raw_block_bytes != 0);
    return block_count(n);
}

// Bytes before the block table: what a mode has of its own is at own_begin.
PLATONIC_HD int64_t own_begin(int dimensions) { return start_bytes + 8 * dimensions; }
PLATONIC_HD int64_t table_begin(Mode mode, int dimensions, int64_t item, int64_t length_bytes) {
    const int64_t own = mode == Mode::raw ? 0 : mode == Mode::constant ? item : quantiser_bytes + length_bytes;
    return own_begin(dimensions) + own;
}
PLATONIC_HD int64_t data_begin(Mode mode, int dimensions, int64_t n, int64_t item, int64_t length_bytes) {
    return table_begin(mode, dimensions, item, length_bytes) + table_entry_bytes * payload_blocks(mode, n, item) + 4;
}

// Bytes of block `b` where they follow from its elements; `bits` is that of fixed symbols.
PLATONIC_HD int64_t plain_block_bytes(Mode mode, int64_t b, int64_t n, int64_t item, int bits) {
    if (mode == Mode::raw) {
        const int64_t rest = n * item - b * raw_block_bytes;
        return rest < raw_block_bytes ? rest : raw_block_bytes;
    }
    const int64_t rest = n - b * block_symbols;
    return fixed_block_bytes(rest < block_symbols ? rest : block_symbols, bits);
}
PLATONIC_HD int64_t plain_block_offset(Mode mode, int64_t b, int bits) {
    return b * (mode == Mode::raw ? raw_block_bytes : fixed_block_bytes(block_symbols, bits));
}

// Little-endian numbers at any address.
template <class T>
PLATONIC_HD void put(uint8_t* at, T value) {
    uint8_t bytes[sizeof(T)];
    memcpy(bytes, &value, sizeof(T));
    for (unsigned i = 0; i < sizeof(T); ++i) at[i] = bytes[i];
}
template <class T>
PLATONIC_HD T get(const uint8_t* at) {
    uint8_t bytes[sizeof(T)];
    for (unsigned i = 0; i < sizeof(T); ++i) bytes[i] = at[i];
    T value;
    memcpy(&value, bytes, sizeof(T));
    return value;
}

}  // namespace platonic
