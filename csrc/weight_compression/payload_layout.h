// Where the fields of a payload's header lie; see weight_compression/FORMAT.md and payload.py, which write the same.
#pragma once

#include <cstdint>
#include <cstring>

#include "weight_compression/codec.h"
#include "weight_compression/stream.h"

namespace platonic {

enum class Mode : int { raw = 0, constant = 1, fixed = 2, entropy = 3, planes = 4 };
enum class PlaneKind : int { raw = 0, constant = 1, coded = 2 };

constexpr uint32_t payload_magic = 0x43574c50;  // "PLWC"
constexpr int payload_version = 0;
constexpr int max_dimensions = 64, max_planes = 8;
constexpr int64_t raw_block_bytes = 1 << 18;
constexpr int64_t start_bytes = 16, quantiser_bytes = 28, plane_bytes = 4;
constexpr int grouped_flag = 1, escaped_flag = 2;

struct Shape {
    int dimensions;
    int64_t sizes[max_dimensions];
};

// ---- what mode planes takes apart: elements of `item` bytes, or the parts of complex ones ----

PLATONIC_HD bool is_complex(int dtype) { return dtype == 10 || dtype == 11; }
PLATONIC_HD int unit_width(int dtype, int64_t item) { return static_cast<int>(is_complex(dtype) ? item / 2 : item); }
PLATONIC_HD int64_t unit_count(int dtype, int64_t n) { return is_complex(dtype) ? 2 * n : n; }
PLATONIC_HD bool units_rotate(int dtype) { return dtype <= static_cast<int>(DType::bfloat16) || is_complex(dtype); }

// ---- bytes before the data: the start, what the mode has of its own, the block table, a checksum ----

PLATONIC_HD int64_t own_begin(int dimensions) { return start_bytes + 8 * dimensions; }
// Of fixed and entropy, with ranges of so many groups or none.
PLATONIC_HD int64_t quantiser_own(int64_t length_bytes, int64_t groups, int64_t item) {
    return quantiser_bytes + length_bytes + (groups > 0 ? 8 + 2 * item * groups : 0);
}
PLATONIC_HD int entry_bytes(bool escaped) { return escaped ? 12 : 8; }
PLATONIC_HD int64_t data_begin(int dimensions, int64_t own, int64_t blocks, bool escaped) {
    return own_begin(dimensions) + own + entry_bytes(escaped) * blocks + 4;
}

PLATONIC_HD int64_t raw_blocks(int64_t bytes) { return bytes / raw_block_bytes + (bytes % raw_block_bytes != 0); }
PLATONIC_HD int64_t group_count(int64_t n, int64_t size) { return size > 0 ? n / size + (n % size != 0) : 0; }

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
