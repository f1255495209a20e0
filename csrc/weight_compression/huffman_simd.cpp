// The entropy coder's row kernels by instruction set; see stream.h for what they do and huffman_simd.h for the layout
// of their states.
#include "weight_compression/huffman_simd.h"

#include <cstring>

#if defined(__AVX512BW__)
#include "weight_compression/huffman_avx512.h"
#elif defined(__AVX2__)
#include "weight_compression/huffman_avx2.h"
#else
#include "weight_compression/huffman_plain.h"
#endif

namespace platonic {
namespace PLATONIC_ISA {

#if defined(__AVX512BW__)

// Alphabets that fit in registers; the rest is AVX2's.
static bool in_registers(const DecodeTables& tables) { return tables.code.used <= 64 * vector_tables; }
static bool in_registers(const EncodeTables& tables) { return tables.tables <= vector_tables; }

bool can_fuse_decoding() { return true; }
bool can_fuse_encoding() { return true; }

void decode_symbols(const DecodeTables& tables, DecodePair* pair, int pairs, int64_t rows) {
    if (in_registers(tables)) return decode_any(tables, pair, pairs, rows, StoreSymbols{});
    decode_any_avx2(tables, pair, pairs, rows, StoreSymbolsAvx2{});
}

void decode_values(const DecodeTables& tables, DecodePair* pair, int pairs, int64_t rows, const Dequantizer<float>& z,
                   bool accumulate, float scale) {
    if (!in_registers(tables)) return decode_values_avx2(tables, pair, pairs, rows, z, accumulate, scale);
    const __m512 first = _mm512_set1_ps(z.first), step = _mm512_set1_ps(z.step);
    if (accumulate)
        decode_any(tables, pair, pairs, rows, StoreValues<true>{first, step, _mm512_set1_ps(scale)});
    else
        decode_any(tables, pair, pairs, rows, StoreValues<false>{first, step, first});
}

void encode_symbols(const EncodeTables& tables, EncodePair& pair, int64_t rows) {
    if (in_registers(tables)) return encode_any(tables, pair, rows, LoadSymbols{});
    encode_rows_avx2(tables, pair, rows, LoadSymbolsAvx2{});
}

void encode_values(const EncodeTables& tables, EncodePair& pair, int64_t rows, const Quantizer<float>& z) {
    if (!in_registers(tables)) return encode_values_avx2(tables, pair, rows, z);
    encode_any(tables, pair, rows, LoadValues{_mm512_set1_ps(z.low), _mm512_set1_ps(z.factor)});
}

void reverse_words(const uint32_t* elements, int64_t count, int half, uint8_t* out) {
    alignas(64) uint16_t picks[32];
    for (int i = 0; i < 32; ++i) picks[i] = static_cast<uint16_t>(2 * (31 - i) + half);
    const __m512i pick = _mm512_load_si512(picks);
    int64_t i = count;
    for (; i >= 32; i -= 32, out += 64) {
        prefetch_to_write(out + 512);
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(_mm512_loadu_si512(elements + i - 32), pick,
                                                           _mm512_loadu_si512(elements + i - 16)));
    }
    for (; i > 0; --i, out += 2) {
        const uint16_t word = static_cast<uint16_t>(elements[i - 1] >> (16 * half));
        memcpy(out, &word, 2);
    }
}

#elif defined(__AVX2__)

bool can_fuse_decoding() { return true; }
bool can_fuse_encoding() { return true; }

void decode_symbols(const DecodeTables& tables, DecodePair* pair, int pairs, int64_t rows) {
    decode_any_avx2(tables, pair, pairs, rows, StoreSymbolsAvx2{});
}

void decode_values(const DecodeTables& tables, DecodePair* pair, int pairs, int64_t rows, const Dequantizer<float>& z,
                   bool accumulate, float scale) {
    decode_values_avx2(tables, pair, pairs, rows, z, accumulate, scale);
}

void encode_symbols(const EncodeTables& tables, EncodePair& pair, int64_t rows) {
    encode_rows_avx2(tables, pair, rows, LoadSymbolsAvx2{});
}

void encode_values(const EncodeTables& tables, EncodePair& pair, int64_t rows, const Quantizer<float>& z) {
    encode_values_avx2(tables, pair, rows, z);
}

void reverse_words(const uint32_t* elements, int64_t count, int half, uint8_t* out) {
    const __m256i mask = _mm256_set1_epi32(0xffff);
    const __m256i reversed =
        _mm256_broadcastsi128_si256(_mm_set_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    int64_t i = count;
    for (; i >= 16; i -= 16, out += 32) {
        prefetch_to_write(out + 512);
        const __m256i a = _mm256_and_si256(_mm256_srli_epi32(load256(elements + i - 16), 16 * half), mask);
        const __m256i b = _mm256_and_si256(_mm256_srli_epi32(load256(elements + i - 8), 16 * half), mask);
        const __m256i both = _mm256_shuffle_epi8(_mm256_packus_epi32(a, b), reversed);
        store256(out, _mm256_permute4x64_epi64(both, 0x72));
    }
    for (; i > 0; --i, out += 2) {
        const uint16_t word = static_cast<uint16_t>(elements[i - 1] >> (16 * half));
        memcpy(out, &word, 2);
    }
}

#else

bool can_fuse_decoding() { return false; }
bool can_fuse_encoding() { return false; }

void decode_symbols(const DecodeTables& tables, DecodePair* pair, int pairs, int64_t rows) {
    for (int p = 0; p < pairs; ++p)
        for (int h = 0; h < 2; ++h) decode_rows_plain(tables, pair[p], h, rows);
}

void decode_values(const DecodeTables&, DecodePair*, int, int64_t, const Dequantizer<float>&, bool, float) {}

void encode_symbols(const EncodeTables& tables, EncodePair& pair, int64_t rows) {
    for (int h = 0; h < 2; ++h) encode_rows_plain(tables, pair, h, rows);
}

void encode_values(const EncodeTables&, EncodePair&, int64_t, const Quantizer<float>&) {}

void reverse_words(const uint32_t* elements, int64_t count, int half, uint8_t* out) {
    for (int64_t i = count; i > 0; --i, out += 2) {
        const uint16_t word = static_cast<uint16_t>(elements[i - 1] >> (16 * half));
        memcpy(out, &word, 2);
    }
}

#endif

}  // namespace PLATONIC_ISA
}  // namespace platonic
