// Packing puts four symbols into a word and two such words into the bytes of eight; unpacking gives every symbol the
// two 32-bit words that it may lie in, by a permutation of registers, and shifts.
#include "weight_compression/fixed_simd.h"

#include <cstring>

#include "common/simd.h"

namespace platonic {
namespace PLATONIC_ISA {
namespace {

// Up to eight symbols, bit by bit: tails, which must not touch a byte beyond their own.
void pack_few(const uint16_t* symbols, int64_t count, int bits, uint8_t* out) {
    uint64_t held = 0;
    int fill = 0;
    for (int64_t i = 0; i < count; ++i) {
        held |= static_cast<uint64_t>(symbols[i]) << fill;
        for (fill += bits; fill >= 8; fill -= 8, held >>= 8) *out++ = static_cast<uint8_t>(held);
    }
    if (fill > 0) *out = static_cast<uint8_t>(held);
}

uint32_t unpack_few(const uint8_t* in, int64_t count, int bits, uint16_t* symbols) {
    uint64_t held = 0;
    int fill = 0;
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        for (; fill < bits; fill += 8) held |= static_cast<uint64_t>(*in++) << fill;
        const uint32_t symbol = static_cast<uint32_t>(held & ((uint64_t{1} << bits) - 1));
        symbols[i] = static_cast<uint16_t>(symbol);
        largest = symbol > largest ? symbol : largest;
        held >>= bits;
        fill -= bits;
    }
    return largest;
}

#if defined(__AVX512F__)

constexpr int64_t unpacked_together = 16, read_together = 64;

struct Unpacker {
    __m512i first, second, down, up, mask, largest;

    explicit Unpacker(int bits) {
        const __m512i at = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(bits));
        first = _mm512_srli_epi32(at, 5);
        second = _mm512_add_epi32(first, _mm512_set1_epi32(1));
        down = _mm512_and_si512(at, _mm512_set1_epi32(31));
        up = _mm512_sub_epi32(_mm512_set1_epi32(32), down);  // by 32: 0
        mask = _mm512_set1_epi32((1 << bits) - 1);
        largest = _mm512_setzero_si512();
    }
    void run(const uint8_t* in, uint16_t* symbols) {
        const __m512i words = _mm512_loadu_si512(in);
        const __m512i low = _mm512_srlv_epi32(_mm512_permutexvar_epi32(first, words), down);
        const __m512i high = _mm512_sllv_epi32(_mm512_permutexvar_epi32(second, words), up);
        const __m512i found = _mm512_and_si512(_mm512_or_si512(low, high), mask);
        largest = _mm512_max_epu32(largest, found);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols), _mm512_cvtepi32_epi16(found));
    }
    uint32_t most() const { return _mm512_reduce_max_epu32(largest); }
};

#elif defined(__AVX2__)

constexpr int64_t unpacked_together = 8, read_together = 32;

struct Unpacker {
    __m256i first, second, down, up, mask, largest;

    explicit Unpacker(int bits) {
        const __m256i at = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
        first = _mm256_srli_epi32(at, 5);
        second = _mm256_add_epi32(first, _mm256_set1_epi32(1));
        down = _mm256_and_si256(at, _mm256_set1_epi32(31));
        up = _mm256_sub_epi32(_mm256_set1_epi32(32), down);
        mask = _mm256_set1_epi32((1 << bits) - 1);
        largest = _mm256_setzero_si256();
    }
    void run(const uint8_t* in, uint16_t* symbols) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
        const __m256i low = _mm256_srlv_epi32(_mm256_permutevar8x32_epi32(words, first), down);
        const __m256i high = _mm256_sllv_epi32(_mm256_permutevar8x32_epi32(words, second), up);
        const __m256i found = _mm256_and_si256(_mm256_or_si256(low, high), mask);
        largest = _mm256_max_epu32(largest, found);
        const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(symbols), narrow);
    }
    uint32_t most() const {
        alignas(32) uint32_t lanes[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
        uint32_t most = 0;
        for (uint32_t lane : lanes) most = lane > most ? lane : most;
        return most;
    }
};

#else

constexpr int64_t unpacked_together = 8, read_together = 24;

uint64_t load_word(const uint8_t* in) {
    uint64_t word;
    memcpy(&word, in, 8);
    return word;
}

struct Unpacker {
    int bits;
    uint32_t mask, largest = 0;

    explicit Unpacker(int bits) : bits(bits), mask((1u << bits) - 1) {}
    void run(const uint8_t* in, uint16_t* symbols) {
        for (int half = 0; half < 2; ++half) {  // four symbols from a word that begins in the byte of the first
            const int at = 4 * half * bits;
            const uint64_t word = load_word(in + at / 8) >> at % 8;  // by 4 bits only where it has at most 60
            for (int k = 0; k < 4; ++k) {
                const uint32_t symbol = static_cast<uint32_t>(word >> k * bits) & mask;
                symbols[4 * half + k] = static_cast<uint16_t>(symbol);
                largest = symbol > largest ? symbol : largest;
            }
        }
    }
    uint32_t most() const { return largest; }
};

#endif

}  // namespace

void pack_fixed(const uint16_t* symbols, int64_t count, int bits, uint8_t* out) {
    int64_t i = 0;
    const int64_t bytes = (count * bits + 7) / 8;
    const auto four = [&](const uint16_t* s) {
        return static_cast<uint64_t>(s[0]) | static_cast<uint64_t>(s[1]) << bits |
               static_cast<uint64_t>(s[2]) << 2 * bits | static_cast<uint64_t>(s[3]) << 3 * bits;
    };
    const int at = 4 * bits;
    for (; i / 8 * bits + 16 <= bytes && i + 8 <= count; i += 8) {
        const uint64_t low = four(symbols + i), high = four(symbols + i + 4);
        const uint64_t words[2] = {at < 64 ? low | high << at : low, at < 64 ? high >> (64 - at) : high};
        memcpy(out + i / 8 * bits, words, 16);
    }
    for (; i < count; i += 8) pack_few(symbols + i, count - i < 8 ? count - i : 8, bits, out + i / 8 * bits);
}

uint32_t unpack_fixed(const uint8_t* in, int64_t count, int bits, uint16_t* symbols) {
    Unpacker unpacker(bits);
    const int64_t bytes = (count * bits + 7) / 8;
    int64_t i = 0;
    for (; i / 8 * bits + read_together <= bytes; i += unpacked_together) unpacker.run(in + i / 8 * bits, symbols + i);
    uint32_t most = unpacker.most();
    for (; i < count; i += 8) {
        const uint32_t some = unpack_few(in + i / 8 * bits, count - i < 8 ? count - i : 8, bits, symbols + i);
        most = some > most ? some : most;
    }
    return most;
}

}  // namespace PLATONIC_ISA
}  // namespace platonic
