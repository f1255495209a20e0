// The entropy coder's rows with AVX-512. Part of huffman_simd.cpp.
//
// Nothing is looked up in memory (gathers are slow, on processors with mitigated ones very slow). Decoding, a code's
// length is the shortest plus the number of lengths whose first code the next 16 bits reach; its rank is a shift and
// an addition by length; its symbol a permutation of up to eight registers of 64 symbols. Encoding, a symbol's entry
// is such a permutation too, and the length sits in the three bits that a 13-bit code leaves free. 32 lanes of 16 bits
// at a time, about 75 instructions each way.
#pragma once

#include "common/simd.h"
#include "weight_compression/huffman_avx2.h"
#include "weight_compression/huffman_simd.h"

// GCC 12 warns of operands that its own intrinsics leave unset.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace platonic {
namespace PLATONIC_ISA {
namespace {

PLATONIC_INLINE __m512i words(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }

// table[index] of 32 lanes from 64 * tables entries, in registers where the compiler has them.
template <int tables>
struct Permutation {
    __m512i part[2 * tables];

    PLATONIC_INLINE explicit Permutation(const uint16_t* table) {
        for (int i = 0; i < 2 * tables; ++i) part[i] = _mm512_load_si512(table + 32 * i);
    }
    PLATONIC_INLINE __m512i operator()(__m512i index) const {
        if (tables == 1) return _mm512_permutex2var_epi16(part[0], index, part[1]);
        // Lanes whose entry has been found must not be taken for an index again: each table has its own mask.
        __mmask32 mask[tables];
        for (int t = 0; t < tables; ++t) {
            const __mmask32 from = t == 0 ? ~0u : _mm512_cmpge_epu16_mask(index, words(64 * t));
            const __mmask32 to = t == tables - 1 ? ~0u : _mm512_cmplt_epu16_mask(index, words(64 * t + 64));
            mask[t] = from & to;
        }
        __m512i found = index;
        for (int t = 0; t < tables; ++t)
            found = _mm512_mask2_permutex2var_epi16(part[2 * t], found, mask[t], part[2 * t + 1]);
        return found;
    }
};

// Sixteen words from p at the lanes of `mask`, zero elsewhere.
PLATONIC_INLINE __m512i expand_words(__mmask16 mask, const uint8_t*& p) {
    const __m512i next = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    p += 2 * __builtin_popcount(mask);
    return _mm512_maskz_expand_epi32(mask, next);
}

// Ranks of `rows` <= chunk_rows rows of `pairs` pairs, to be turned into symbols afterwards: looking them up here would
// fill the scheduler with instructions that the next row does not wait for.
// `steps`: lengths beyond the shortest that are looked for, rounded up to even.
template <int pairs, int steps>
void decode_ranks(const DecodeTables& decode, DecodePair* pair, int64_t rows, bool values, uint16_t* ranks) {
    const __m512i offset = _mm512_load_si512(decode.rank_offset), shortest = words(decode.code.shortest);
    const __m512i ones = words(-1), sixteen = words(16), fifteen = words(15);
    __m512i top[pairs], low[pairs], fill[pairs];
    const uint8_t* next[pairs][2];
    const char* to[pairs][2];
    const int64_t to_row = values ? stream_lanes * sizeof(float) : stream_lanes * sizeof(uint16_t);
    for (int p = 0; p < pairs; ++p) {
        for (int h = 0; h < 2; ++h)
            to[p][h] = values ? reinterpret_cast<const char*>(pair[p].values[h])
                              : reinterpret_cast<const char*>(pair[p].symbols[h]);
        top[p] = _mm512_load_si512(pair[p].state.top);
        low[p] = _mm512_load_si512(pair[p].state.low);
        fill[p] = _mm512_load_si512(pair[p].state.fill);
        for (int h = 0; h < 2; ++h) next[p][h] = pair[p].next[h];
    }
    for (int64_t row = 0; row < rows; ++row) {
#pragma GCC unroll 2
        for (int p = 0; p < pairs; ++p) {
            __m512i length = shortest, more = _mm512_setzero_si512();  // two chains: masked additions take three cycles
#pragma GCC unroll 14
            for (int i = 0; i < steps; i += 2) {
                const __mmask32 a = _mm512_cmpgt_epu16_mask(top[p], _mm512_load_si512(decode.last_code[i]));
                const __mmask32 b = _mm512_cmpgt_epu16_mask(top[p], _mm512_load_si512(decode.last_code[i + 1]));
                length = _mm512_mask_sub_epi16(length, a, length, ones);
                more = _mm512_mask_sub_epi16(more, b, more, ones);
            }
            length = _mm512_add_epi16(length, more);
            // Asked for now and for writing, the lines that store_ranks is going to fill arrive at 10 GB/s instead
            // of 7.
            prefetch_to_write(to[p][0] + row * to_row);
            prefetch_to_write(to[p][1] + row * to_row);
            const __m512i rest = _mm512_sub_epi16(sixteen, length);
            const __m512i left = _mm512_sub_epi16(fill[p], length);  // negative where a word is due
            const __mmask16 due1 = _mm512_movepi32_mask(left), due0 = _mm512_movepi32_mask(_mm512_slli_epi32(left, 16));
            const __m512i words0 = expand_words(due0, next[p][0]), words1 = expand_words(due1, next[p][1]);
            const __m512i word = _mm512_or_si512(words0, _mm512_slli_epi32(words1, 16));
            _mm512_store_si512(
                ranks + (row * pairs + p) * 2 * stream_lanes,
                _mm512_add_epi16(_mm512_srlv_epi16(top[p], rest), _mm512_permutexvar_epi16(length, offset)));
            fill[p] = _mm512_and_si512(left, fifteen);
            // `low` is empty where a word is due: all its bits have moved up.
            top[p] = _mm512_ternarylogic_epi32(_mm512_sllv_epi16(top[p], length), _mm512_srlv_epi16(low[p], rest),
                                               _mm512_srlv_epi16(word, fill[p]), 0xfe);
            low[p] = _mm512_or_si512(_mm512_sllv_epi16(low[p], length),
                                     _mm512_sllv_epi16(word, _mm512_sub_epi16(sixteen, fill[p])));
        }
    }
    for (int p = 0; p < pairs; ++p) {
        _mm512_store_si512(pair[p].state.top, top[p]);
        _mm512_store_si512(pair[p].state.low, low[p]);
        _mm512_store_si512(pair[p].state.fill, fill[p]);
        for (int h = 0; h < 2; ++h) pair[p].next[h] = next[p][h];
    }
}

struct StoreSymbols {
    static constexpr bool values = false;

    PLATONIC_INLINE void operator()(const DecodePair& pair, int half, int64_t row, __m512i q) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(pair.symbols[half] + row * stream_lanes),
                            _mm512_cvtepi32_epi16(q));
    }
};

template <bool accumulate>
struct StoreValues {
    static constexpr bool values = true;
    __m512 first, step, scale;

    PLATONIC_INLINE void operator()(const DecodePair& pair, int half, int64_t row, __m512i q) const {
        float* out = pair.values[half] + row * stream_lanes;
        __m512 value = _mm512_add_ps(first, _mm512_mul_ps(step, _mm512_cvtepi32_ps(q)));
        if (accumulate) value = _mm512_add_ps(_mm512_loadu_ps(out), _mm512_mul_ps(scale, value));
        _mm512_storeu_ps(out, value);
    }
};

template <int tables, class Store>
void store_ranks(const DecodeTables& decode, const DecodePair* pair, int pairs, int64_t rows, const uint16_t* ranks,
                 const Store& store) {
    const Permutation<tables> symbol_of(decode.symbols);
    const __m512i low_half = _mm512_set1_epi32(0xffff);
    for (int p = 0; p < pairs; ++p) {
        const DecodePair to = pair[p];
        for (int64_t row = 0; row < rows; ++row) {
            const __m512i symbol = symbol_of(_mm512_load_si512(ranks + (row * pairs + p) * 2 * stream_lanes));
            store(to, 0, row, _mm512_and_si512(symbol, low_half));
            store(to, 1, row, _mm512_srli_epi32(symbol, 16));
        }
    }
}

template <class Store>
void decode_any(const DecodeTables& decode, DecodePair* pair, int pairs, int64_t rows, const Store& store) {
    alignas(64) uint16_t ranks[most_pairs * chunk_rows * 2 * stream_lanes];
    const bool few = decode.code.longest - decode.code.shortest <= 8;
    if (pairs == 1)
        few ? decode_ranks<1, 8>(decode, pair, rows, store.values, ranks)
            : decode_ranks<1, 14>(decode, pair, rows, store.values, ranks);
    else
        few ? decode_ranks<2, 8>(decode, pair, rows, store.values, ranks)
            : decode_ranks<2, 14>(decode, pair, rows, store.values, ranks);
    const int tables = (decode.code.used + 63) / 64;
    if (tables == 1) return store_ranks<1>(decode, pair, pairs, rows, ranks, store);
    if (tables == 2) return store_ranks<2>(decode, pair, pairs, rows, ranks, store);
    if (tables == 3) return store_ranks<3>(decode, pair, pairs, rows, ranks, store);
    if (tables == 4) return store_ranks<4>(decode, pair, pairs, rows, ranks, store);
    store_ranks<vector_tables>(decode, pair, pairs, rows, ranks, store);
}

struct LoadSymbols {
    PLATONIC_INLINE __m512i operator()(const EncodePair& pair, int half, int64_t back) const {
        return _mm512_cvtepu16_epi32(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pair.symbols[half] - back * stream_lanes)));
    }
};

struct LoadValues {
    __m512 low, factor;

    PLATONIC_INLINE __m512i operator()(const EncodePair& pair, int half, int64_t back) const {
        const float* x = pair.values[half] - back * stream_lanes;
        __builtin_prefetch(x - 512);
        return _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x), low), factor));
    }
};

// Entries of the last `rows` rows, last first.
template <int tables, class Load>
void load_entries(const EncodeTables& encode, const EncodePair& pair, int64_t rows, const Load& load,
                  uint16_t* entries) {
    const Permutation<tables> entry_of(encode.entries);
    // Words come out last first and are turned round at the end, so lanes go the other way too.
    const __m512i reversed = _mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const EncodePair from = pair;
    for (int64_t row = 0; row < rows; ++row) {
        const __m512i symbol = _mm512_or_si512(load(from, 0, row + 1), _mm512_slli_epi32(load(from, 1, row + 1), 16));
        _mm512_store_si512(entries + 2 * stream_lanes * row, entry_of(_mm512_permutexvar_epi32(reversed, symbol)));
    }
}

template <bool narrow>
void encode_entries(const EncodeTables& encode, EncodePair& pair, int64_t rows, const uint16_t* entries) {
    const __m512i reversed = _mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i sixteen = words(16), fifteen = words(15), ones = words(-1);
    const __m512i wrap = words(encode.wrap), field = words(encode.wrap - 1), most = words(16 - encode.shortest);
    const __m512i long0 = words(encode.long_codes[0]), long1 = words(encode.long_codes[1]),
                  long2 = words(encode.long_codes[2]);
    __m512i top = _mm512_permutexvar_epi32(reversed, _mm512_load_si512(pair.state.top));
    __m512i low = _mm512_permutexvar_epi32(reversed, _mm512_load_si512(pair.state.low));
    __m512i fill = _mm512_permutexvar_epi32(reversed, _mm512_load_si512(pair.state.fill));
    uint32_t *next0 = pair.next[0], *next1 = pair.next[1];
    for (int64_t row = 0; row < rows; ++row) {
        const __m512i entry = _mm512_load_si512(entries + 2 * stream_lanes * row);
        __m512i rest = _mm512_sub_epi16(most, _mm512_and_si512(entry, field));
        rest = _mm512_mask_sub_epi16(rest, _mm512_cmpgt_epu16_mask(entry, long0), rest, wrap);
        if (narrow) {
            rest = _mm512_mask_sub_epi16(rest, _mm512_cmpgt_epu16_mask(entry, long1), rest, wrap);
            rest = _mm512_mask_sub_epi16(rest, _mm512_cmpgt_epu16_mask(entry, long2), rest, wrap);
        }
        const __m512i code = _mm512_srlv_epi16(entry, rest);  // rest = 16 - length
        // fill + length >= 16 where negative: the lane gives its low word away.
        const __m512i room = _mm512_sub_epi16(_mm512_add_epi16(rest, ones), fill);
        const __mmask16 full1 = _mm512_movepi32_mask(room), full0 = _mm512_movepi32_mask(_mm512_slli_epi32(room, 16));
        _mm512_storeu_si512(next0, _mm512_maskz_compress_epi32(full0, low));
        _mm512_storeu_si512(next1, _mm512_maskz_compress_epi32(full1, low));
        next0 += __builtin_popcount(full0);
        next1 += __builtin_popcount(full1);
        const __m512i full = _mm512_srai_epi16(room, 15);
        const __m512i merged = _mm512_or_si512(top, _mm512_sllv_epi16(code, fill));
        const __m512i over = _mm512_srlv_epi16(code, _mm512_sub_epi16(sixteen, fill));  // zero where not full
        low = _mm512_ternarylogic_epi32(full, merged, low, 0xca);
        top = _mm512_ternarylogic_epi32(full, over, merged, 0xca);
        fill = _mm512_andnot_si512(room, fifteen);
    }
    _mm512_store_si512(pair.state.top, _mm512_permutexvar_epi32(reversed, top));
    _mm512_store_si512(pair.state.low, _mm512_permutexvar_epi32(reversed, low));
    _mm512_store_si512(pair.state.fill, _mm512_permutexvar_epi32(reversed, fill));
    pair.next[0] = next0;
    pair.next[1] = next1;
}

template <class Load>
void encode_any(const EncodeTables& encode, EncodePair& pair, int64_t rows, const Load& load) {
    alignas(64) uint16_t entries[chunk_rows * 2 * stream_lanes];
    if (encode.tables == 1)
        load_entries<1>(encode, pair, rows, load, entries);
    else if (encode.tables == 2)
        load_entries<2>(encode, pair, rows, load, entries);
    else if (encode.tables == 3)
        load_entries<3>(encode, pair, rows, load, entries);
    else if (encode.tables == 4)
        load_entries<4>(encode, pair, rows, load, entries);
    else
        load_entries<vector_tables>(encode, pair, rows, load, entries);
    encode.wrap == 8 ? encode_entries<false>(encode, pair, rows, entries)
                     : encode_entries<true>(encode, pair, rows, entries);
}

}  // namespace
}  // namespace PLATONIC_ISA
}  // namespace platonic
