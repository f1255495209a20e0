// The row kernels of the entropy coder, once per instruction set. Blocks go in pairs: lane l of the pair's first and
// second block are elements 2 l and 2 l + 1 of the states, so that 32 lanes of 16 bits fill an AVX-512 register.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "weight_compression/code_lengths.h"
#include "weight_compression/source.h"
#include "weight_compression/stream.h"

namespace platonic {

// A lane's bits: 16 in `top` (the next to be decoded are its most significant), `fill` more, 0 to 15, in `low`
// (left-aligned when decoding; when encoding `low` holds the lowest 16 bits and `top` the `fill` bits above them).
struct PairState {
    alignas(64) uint16_t top[2 * stream_lanes];
    alignas(64) uint16_t low[2 * stream_lanes];
    alignas(64) uint16_t fill[2 * stream_lanes];
};

// ---- decoding ----

constexpr int vector_tables = 8;  // of 64 symbols each: alphabets that the AVX-512 kernel decodes from registers

struct DecodeTables {
    CanonicalCode code;
    // Of the AVX-512 kernel, which finds a code's length by comparing and its symbol by its rank.
    alignas(64) uint16_t
        last_code[max_code_length][2 * stream_lanes];    // left-aligned, below the first of length shortest + 1 + i
    alignas(64) uint16_t rank_offset[2 * stream_lanes];  // first_rank - first_code, by length
    // Of the AVX2 kernel, which does the same.
    alignas(32) int16_t half_last_code[max_code_length][stream_lanes];  // last_code / 2: comparisons are signed
    alignas(16) uint8_t offset_bytes[2][16];                            // rank_offset's low bytes, its high bytes as
                                                                        // of length + 8
    alignas(32) uint8_t byte_symbols[16][32];  // symbols of ranks 16 t to 16 t + 15, twice, xor those of t - 1 (but not
                                               // of 7 for 8)
    bool bytes;                                // all symbols are below 256
    // Of both.
    alignas(64) uint16_t symbols[max_coded_levels];  // by rank
    // Of the plain kernel: symbol * 16 + length by the next `longest` bits.
    alignas(64) uint16_t entries[(1 << max_code_length) + 2];
};

void make_decode_tables(const uint8_t* lengths, int64_t levels, const CanonicalCode& code, DecodeTables* tables);

constexpr int64_t chunk_rows = 64;  // at most in one call
constexpr int most_pairs = 2;

struct DecodePair {
    PairState state;
    const uint8_t* next[2];  // next word of either block
    uint16_t* symbols[2];    // where the call's rows go, 16 symbols each
    float* values[2];        // or 16 values
};

// ---- encoding ----

struct EncodeTables {
    // Of the AVX-512 kernel: the code left-aligned in 16 bits, below it (length - shortest) % wrap; codes of
    // wrap, 2 wrap and 3 wrap bits more than the shortest start above long_codes. wrap is 8, or 4 if there are codes of
    // 14 bits, which leave two bits free instead of three.
    alignas(64) uint16_t entries[64 * vector_tables];
    int32_t shortest, wrap, tables, long_codes[3];
    // Of the AVX2 kernel: code + 65536 * 2^length, and the last symbol.
    uint32_t powers[max_coded_levels];
    int32_t last;
    // Of the plain kernel: code + 65536 * length.
    uint32_t codes[max_coded_levels];
};

void make_encode_tables(const uint8_t* lengths, int64_t levels, const CanonicalCode& code, EncodeTables* tables);

struct EncodePair {
    PairState state;
    uint32_t* next[2];           // where the next words go: one per element, in the half that reverse_words takes
    const uint16_t* symbols[2];  // one behind the call's last row
    const float* values[2];
};

PLATONIC_FOR_EACH_ISA(
    // `rows` rows of 1 to most_pairs pairs. The caller has made sure that 32 bytes a row can be read from every next[].
    void decode_symbols(const DecodeTables& tables, DecodePair* pair, int pairs, int64_t rows);
    // The same into values, float32 with post = 1: symbols of first + step * q, added with `scale` if `accumulate`.
    // Only where can_fuse_decoding().
    void decode_values(const DecodeTables& tables, DecodePair* pair, int pairs, int64_t rows,
                       const Dequantizer<float>& z, bool accumulate, float scale);
    bool can_fuse_decoding();

    // `rows` rows before symbols[], from the last to the first. next[] has room for 16 elements a row and 16 more.
    void encode_symbols(const EncodeTables& tables, EncodePair& pair, int64_t rows);
    // The same from float32 values, quantised with z.pre = 1. Only where can_fuse_encoding().
    void encode_values(const EncodeTables& tables, EncodePair& pair, int64_t rows, const Quantizer<float>& z);
    bool can_fuse_encoding();

    // Bytes of a block's words, `count` elements of which `half` holds the word, last first.
    void reverse_words(const uint32_t* words, int64_t count, int half, uint8_t* out);)

}  // namespace platonic
