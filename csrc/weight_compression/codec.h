// Compressing and decompressing the blocks of one tensor on the CPU. The pipeline:
//
//   value_range -> sample_counts -> (levels.h) -> symbol_counts -> code_lengths -> encode_blocks
//   decode_blocks
//
// Headers and block tables are laid out by weight_compression/payload.py; FORMAT.md has the whole format.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "weight_compression/quantize_simd.h"
#include "weight_compression/source.h"
#include "weight_compression/stream.h"

namespace platonic {

// Of a block in the payload's table.
struct BlockEntry {
    uint32_t bytes, checksum;
};

// How symbols are stored: by a canonical prefix code with these lengths, or, if lengths is null, with `bits` each.
struct Coding {
    int64_t levels;
    const uint8_t* lengths;
    int bits;
};

enum class DecodeStatus : int { ok = 0, checksum = 1, malformed = 2 };

struct DecodeResult {
    DecodeStatus status;
    int64_t block;  // one that failed: the lowest of those that were looked at
};

namespace cpu {

// Of all n >= 1 values.
Range value_range(const Values& x, const Launch& on);

// Numbers of values of a sample (see levels.h) in `bins` equal bins of [lo, hi].
void sample_counts(const Values& x, double lo, double hi, int64_t bins, double fraction, int64_t* counts);

// counts[levels] of all symbols.
void symbol_counts(const Values& x, double lo, double hi, int64_t levels, int64_t* counts, const Launch& on);

// Writes the blocks one behind the other and returns their bytes. `out` has `room` bytes: coded_bytes_bound(n, total
// bits) or, for fixed bits, fixed_bytes(n, bits); table for block_count(n) entries. Throws std::runtime_error if the
// values need more, which they do only if they have changed since they were counted.
int64_t encode_blocks(const Values& x, double lo, double hi, const Coding& coding, uint8_t* out, int64_t room,
                      BlockEntry* table, const Launch& on);

// The inverse into `out`, of n elements. `data` is `size` bytes, which the table's blocks fill exactly. With `check`,
// checksums are compared before a block is decoded, and before anything is added when accumulating.
DecodeResult decode_blocks(const uint8_t* data, int64_t size, const BlockEntry* table, int64_t n, double lo, double hi,
                           const Coding& coding, const Target& out, bool check, const Launch& on);

// Checksums of blocks of `block` bytes (the last may be shorter).
void checksum_blocks(const uint8_t* data, int64_t size, int64_t block, BlockEntry* table, const Launch& on);

}  // namespace cpu

// ---- symbols of a fixed number of bits: bit i * bits of a block begins its symbol i, least significant bit first ----

PLATONIC_HD int fixed_bits(int64_t levels) {
    int bits = 1;
    while ((int64_t{1} << bits) < levels) ++bits;
    return bits;
}
PLATONIC_HD int64_t fixed_block_bytes(int64_t n, int bits) { return (n * bits + 7) / 8; }
PLATONIC_HD int64_t fixed_bytes(int64_t n, int bits) {
    return n / block_symbols * fixed_block_bytes(block_symbols, bits) + fixed_block_bytes(n % block_symbols, bits);
}

}  // namespace platonic
