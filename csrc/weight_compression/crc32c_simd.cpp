// CRC32C: the processor's instruction on three stretches at once, which hides its latency of three cycles, where
// there is one; else eight bytes at a time by tables.
#include <cstring>

#include "weight_compression/crc32c.h"

#if defined(__SSE4_2__)
#include <nmmintrin.h>
#endif

namespace platonic {
namespace PLATONIC_ISA {
namespace {

constexpr uint32_t polynomial = 0x82f63b78;  // reflected

#if defined(__SSE4_2__)

constexpr int64_t stretch = 2048;  // bytes, a power of two

// What `stretch` zero bytes do to a checksum, by its bytes.
struct Shift {
    uint32_t table[4][256];
    constexpr Shift() : table() {
        uint32_t column[32] = {};  // the operator of one zero bit, then of 2, 4, ... bits
        for (int i = 0; i < 32; ++i) column[i] = i == 0 ? polynomial : 1u << (i - 1);
        for (int64_t bits = 1; bits < 8 * stretch; bits *= 2) {
            uint32_t twice[32] = {};
            for (int i = 0; i < 32; ++i)
                for (int k = 0; k < 32; ++k)
                    if (column[i] >> k & 1) twice[i] ^= column[k];
            for (int i = 0; i < 32; ++i) column[i] = twice[i];
        }
        for (int byte = 0; byte < 4; ++byte)
            for (int value = 0; value < 256; ++value)
                for (int k = 0; k < 8; ++k)
                    if (value >> k & 1) table[byte][value] ^= column[8 * byte + k];
    }
};
constexpr Shift shift;

uint32_t shifted(uint32_t crc) {
    return shift.table[0][crc & 255] ^ shift.table[1][crc >> 8 & 255] ^ shift.table[2][crc >> 16 & 255] ^
           shift.table[3][crc >> 24];
}

uint64_t word(const uint8_t* p) {
    uint64_t w;
    memcpy(&w, p, 8);
    return w;
}

uint32_t update(uint32_t crc, const uint8_t* p, int64_t size) {
    while (size >= 3 * stretch) {
        uint64_t a = crc, b = 0, c = 0;
        for (int64_t i = 0; i < stretch; i += 64) {
            // Three streams are more than the hardware follows in stretches this short.
            for (int64_t line = 0; line < 192; line += 64) __builtin_prefetch(p + 3 * stretch + 3 * i + line);
            for (int64_t k = i; k < i + 64; k += 8) {
                a = _mm_crc32_u64(a, word(p + k));
                b = _mm_crc32_u64(b, word(p + stretch + k));
                c = _mm_crc32_u64(c, word(p + 2 * stretch + k));
            }
        }
        crc = shifted(shifted(static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
        p += 3 * stretch;
        size -= 3 * stretch;
    }
    for (; size >= 8; p += 8, size -= 8) crc = static_cast<uint32_t>(_mm_crc32_u64(crc, word(p)));
    for (; size > 0; ++p, --size) crc = _mm_crc32_u8(crc, *p);
    return crc;
}

#else

// table[k][v]: what byte v does to the checksum k bytes later.
struct Tables {
    uint32_t table[8][256];
    constexpr Tables() : table() {
        for (uint32_t v = 0; v < 256; ++v) {
            uint32_t crc = v;
            for (int k = 0; k < 8; ++k) crc = crc >> 1 ^ (crc & 1 ? polynomial : 0);
            table[0][v] = crc;
        }
        for (int k = 1; k < 8; ++k)
            for (int v = 0; v < 256; ++v) table[k][v] = table[k - 1][v] >> 8 ^ table[0][table[k - 1][v] & 255];
    }
};
constexpr Tables tables;

uint32_t update(uint32_t crc, const uint8_t* p, int64_t size) {
    for (; size >= 8; p += 8, size -= 8) {
        const uint32_t low = crc ^ (p[0] | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
                                    static_cast<uint32_t>(p[3]) << 24);
        crc = tables.table[7][low & 255] ^ tables.table[6][low >> 8 & 255] ^ tables.table[5][low >> 16 & 255] ^
              tables.table[4][low >> 24] ^ tables.table[3][p[4]] ^ tables.table[2][p[5]] ^ tables.table[1][p[6]] ^
              tables.table[0][p[7]];
    }
    for (; size > 0; ++p, --size) crc = crc >> 8 ^ tables.table[0][(crc ^ *p) & 255];
    return crc;
}

#endif

}  // namespace

uint32_t crc32c(uint32_t crc, const uint8_t* bytes, int64_t size) { return ~update(~crc, bytes, size); }

}  // namespace PLATONIC_ISA
}  // namespace platonic
