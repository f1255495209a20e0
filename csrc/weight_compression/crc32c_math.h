// CRC32C as arithmetic, for computing a checksum in parallel: the register is a polynomial over GF(2) modulo P, bit 31
// the coefficient of x^0, and a little-endian word w takes it from r to (r + w) x^32. The sum is linear: every thread
// takes words of its own, and the threads' sums, each times its power of x, add up to the whole.
#pragma once

#include <cstdint>

#include "common/launch.h"

namespace platonic {

constexpr uint32_t crc32c_polynomial = 0x82f63b78;  // P without x^32

constexpr PLATONIC_HD uint32_t crc32c_times_x(uint32_t a) { return a >> 1 ^ (a & 1 ? crc32c_polynomial : 0); }

constexpr PLATONIC_HD uint32_t crc32c_multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (int i = 0; i < 32; ++i) {
        product ^= b >> (31 - i) & 1 ? a : 0;
        a = crc32c_times_x(a);
    }
    return product;
}

// The register after one more byte.
constexpr PLATONIC_HD uint32_t crc32c_byte(uint32_t crc, uint8_t byte) {
    crc ^= byte;
    for (int i = 0; i < 8; ++i) crc = crc32c_times_x(crc);
    return crc;
}

constexpr int crc32c_threads = 256;  // words of a message are dealt to so many threads in turn

struct Crc32cTables {
    uint32_t turn[4][256];              // byte b of a register times x^(32 crc32c_threads): one turn of the deal
    uint32_t from_end[crc32c_threads];  // x^(32 (crc32c_threads - t)), for the thread that takes the t-th of a turn
};

constexpr Crc32cTables make_crc32c_tables() {
    Crc32cTables tables = {};
    uint32_t word = 0x80000000;  // x^0, then x^32
    for (int i = 0; i < 32; ++i) word = crc32c_times_x(word);
    tables.from_end[crc32c_threads - 1] = word;
    for (int t = crc32c_threads - 1; t > 0; --t) tables.from_end[t - 1] = crc32c_multiply(tables.from_end[t], word);
    uint32_t column[32] = {};  // of bit k, which is x^(31 - k)
    column[31] = tables.from_end[0];
    for (int k = 31; k > 0; --k) column[k - 1] = crc32c_times_x(column[k]);
    for (int b = 0; b < 4; ++b) {
        for (int k = 0; k < 8; ++k)
            for (int v = 0; v < 1 << k; ++v) tables.turn[b][v | 1 << k] = tables.turn[b][v] ^ column[8 * b + k];
    }
    return tables;
}

}  // namespace platonic
