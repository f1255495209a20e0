// The entropy coder's rows with AVX2. Part of huffman_simd.cpp.
//
// AVX2 shifts no 16-bit lanes by different counts, but multiplies them: the low and the high half of x * 2^n are x << n
// and x >> (16 - n). So the 16 lanes of a block are one register of `top`, one of `low`, and powers of two in place of
// lengths. Powers, and all else that depends on a length, are byte shuffles: the index of a 16-bit lane is (n, n + 8),
// of which a shuffle looks at four bits, so that one table serves the low and the high byte.
//
// Decoding, a code's length is found by comparing and its rank by multiplying, as with AVX-512. Ranks become symbols
// afterwards: alphabets of 256 by shuffles, 16 symbols each, larger ones in memory. Encoding, codes and powers are
// looked up in memory beforehand.
#pragma once

#include <cstring>

#include "common/simd.h"
#include "weight_compression/huffman_simd.h"

namespace platonic {
namespace PLATONIC_ISA {
namespace {

// Controls of shuffles within eight 16-bit lanes, by the set of lanes.
struct LaneShuffles {
    alignas(32) uint8_t expand[256][16];    // words in order to the lanes of the set, zero elsewhere
    alignas(32) uint8_t compress[256][16];  // the lanes of the set in descending order, then whatever
};

constexpr LaneShuffles make_lane_shuffles() {
    LaneShuffles to{};
    for (int set = 0; set < 256; ++set) {
        int words = 0;
        for (int l = 0; l < 8; ++l) {
            const bool in = (set >> l & 1) != 0;
            to.expand[set][2 * l] = static_cast<uint8_t>(in ? 2 * words : 0x80);
            to.expand[set][2 * l + 1] = static_cast<uint8_t>(in ? 2 * words + 1 : 0x80);
            words += in;
        }
        int at = 0;
        for (int l = 7; l >= 0; --l) {
            if ((set >> l & 1) == 0) continue;
            to.compress[set][at++] = static_cast<uint8_t>(2 * l);
            to.compress[set][at++] = static_cast<uint8_t>(2 * l + 1);
        }
    }
    return to;
}

constexpr LaneShuffles lane_shuffles = make_lane_shuffles();

PLATONIC_INLINE __m256i lanes16(int x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }

PLATONIC_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

PLATONIC_INLINE void store256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

PLATONIC_INLINE __m256i load_halves(const void* low, const void* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(low))),
                                   _mm_loadu_si128(static_cast<const __m128i*>(high)), 1);
}

// Keeps GCC from making vectors of look-ups in memory, which takes it more shuffles than there were loads and stores.
PLATONIC_INLINE void keep_scalar(uint32_t& x) { asm("" : "+r"(x)); }

// __builtin_prefetch(p, 1) becomes a prefetch for reading unless the compiler is told of PREFETCHW, which processors
// that lack it take for a no-op.
PLATONIC_INLINE void prefetch_to_write(const void* p) {
    asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));
}

// The same 16 bytes for both halves of a register.
PLATONIC_INLINE __m256i byte_table(const uint8_t* bytes) { return load_halves(bytes, bytes); }

// 2^n from an index (n, n + 8), 0 <= n <= 15.
PLATONIC_INLINE __m256i power_table() {
    static constexpr uint8_t bytes[16] = {1, 2, 4, 8, 16, 32, 64, 128};
    return byte_table(bytes);
}

// One block's 16 of a pair's 32 lanes.
PLATONIC_INLINE __m256i load_lanes(const uint16_t* pair, int half) {
    const __m256i a = load256(pair), b = load256(pair + 16), mask = _mm256_set1_epi32(0xffff);
    const __m256i both = half == 0 ? _mm256_packus_epi32(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask))
                                   : _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
    return _mm256_permute4x64_epi64(both, 0xd8);
}

PLATONIC_INLINE void store_lanes(uint16_t* pair, __m256i first, __m256i second) {
    const __m256i a = _mm256_unpacklo_epi16(first, second), b = _mm256_unpackhi_epi16(first, second);
    store256(pair, _mm256_permute2x128_si256(a, b, 0x20));
    store256(pair + 16, _mm256_permute2x128_si256(a, b, 0x31));
}

// The four sets of eight lanes that are negative: of the first and the second block's lanes below 8 in bytes 0 and 1,
// above in bytes 2 and 3.
PLATONIC_INLINE uint32_t negative_lanes(__m256i first, __m256i second) {
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(first, second)));
}

// ---- decoding ----

constexpr int pair_lanes = 2 * stream_lanes;

// Ranks of `rows` <= chunk_rows rows of `pairs` pairs. Of 8 bits if `narrow`: a pair's row as the first and the second
// block's lanes below 8, then those above. Else of 16 bits, block by block.
// `steps`: lengths beyond the shortest that are looked for, even. A pair's row is about 100 instructions and, by their
// tables, a latency of 33 cycles. Two pairs at a time: measured on Cascade Lake, 0.98 ns a symbol against 1.04 one by
// one on a core of its own, 1.77 against 1.69 beside a busy neighbour; processors that start more than four
// instructions a cycle have the more to gain.
template <int pairs, int steps, bool narrow>
void decode_ranks_avx2(const DecodeTables& decode, DecodePair* pair, int64_t rows, bool values, uint8_t* ranks) {
    constexpr int row_bytes = pair_lanes * (narrow ? 1 : 2);
    static constexpr uint8_t shift_bytes[16] = {1, 0, 0, 0, 0, 0, 0, 0, 0, 128, 64, 32, 16, 8, 4, 2};
    const __m256i powers = power_table(), shifts = byte_table(shift_bytes);  // 2^n and 2^(16 - n)
    const __m256i offset_low = byte_table(decode.offset_bytes[0]), offset_high = byte_table(decode.offset_bytes[1]);
    const __m256i fifteen = _mm256_set1_epi8(15), eight = lanes16(0x0800);
    const __m256i low_bytes = lanes16(0x00ff);
    const __m256i shortest = _mm256_add_epi8(_mm256_set1_epi8(static_cast<char>(decode.code.shortest)), eight);
    __m256i top[pairs][2], low[pairs][2], fill[pairs][2];  // `fill` as an index
    const uint8_t* next[pairs][2];
    const float* to_values[pairs][2];
    for (int p = 0; p < pairs; ++p) {
        for (int h = 0; h < 2; ++h) {
            top[p][h] = load_lanes(pair[p].state.top, h);
            low[p][h] = load_lanes(pair[p].state.low, h);
            const __m256i n = load_lanes(pair[p].state.fill, h);
            fill[p][h] = _mm256_add_epi8(_mm256_or_si256(n, _mm256_slli_epi16(n, 8)), eight);
            next[p][h] = pair[p].next[h];
            to_values[p][h] = values ? pair[p].values[h] : nullptr;
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
#pragma GCC unroll 2
        for (int p = 0; p < pairs; ++p) {
            __m256i left[2], power[2], rank[2];
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                const __m256i code = _mm256_srli_epi16(top[p][h], 1);
                __m256i length = shortest, more = _mm256_setzero_si256();
#pragma GCC unroll 14
                for (int i = 0; i < steps; i += 2) {
                    length = _mm256_sub_epi8(length, _mm256_cmpgt_epi16(code, load256(decode.half_last_code[i])));
                    more = _mm256_sub_epi8(more, _mm256_cmpgt_epi16(code, load256(decode.half_last_code[i + 1])));
                }
                length = _mm256_add_epi8(length, more);
                asm("" : "+x"(length));                         // or GCC adds the same comparisons up in several ways
                left[h] = _mm256_sub_epi8(fill[p][h], length);  // both bytes negative where a word is due
                power[h] = _mm256_shuffle_epi8(powers, length);
                __m256i offset = _mm256_shuffle_epi8(offset_low, length);
                if (!narrow) offset = _mm256_blendv_epi8(_mm256_shuffle_epi8(offset_high, length), offset, low_bytes);
                rank[h] = _mm256_add_epi16(_mm256_mulhi_epu16(top[p][h], power[h]), offset);
            }
            uint8_t* to = ranks + (row * pairs + p) * row_bytes;
            if (narrow) {
                store256(to, _mm256_packus_epi16(_mm256_and_si256(rank[0], low_bytes),
                                                 _mm256_and_si256(rank[1], low_bytes)));
            } else {
                store256(to, rank[0]);
                store256(to + 32, rank[1]);
            }
            if (values) {  // see decode_ranks of AVX-512
                prefetch_to_write(to_values[p][0] + row * stream_lanes);
                prefetch_to_write(to_values[p][1] + row * stream_lanes);
            }
            const uint32_t due = negative_lanes(left[0], left[1]);
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                const uint32_t below = due >> (8 * h) & 255, above = due >> (16 + 8 * h) & 255;
                const __m256i source = load_halves(next[p][h], next[p][h] + 2 * __builtin_popcount(below));
                const __m256i control = load_halves(lane_shuffles.expand[below], lane_shuffles.expand[above]);
                next[p][h] += 2 * __builtin_popcount(due & (0x00ff00ffu << (8 * h)));
                const __m256i word = _mm256_shuffle_epi8(source, control);
                fill[p][h] = _mm256_add_epi8(_mm256_and_si256(left[h], fifteen), eight);
                // Where a word is due, 2 to 15 bits are left: the power fits. `low` is empty there: all its bits have
                // moved up.
                const __m256i shift = _mm256_shuffle_epi8(shifts, fill[p][h]);
                top[p][h] = _mm256_or_si256(
                    _mm256_or_si256(_mm256_mullo_epi16(top[p][h], power[h]), _mm256_mulhi_epu16(low[p][h], power[h])),
                    _mm256_mulhi_epu16(word, shift));
                low[p][h] = _mm256_or_si256(_mm256_mullo_epi16(low[p][h], power[h]), _mm256_mullo_epi16(word, shift));
            }
        }
    }
    for (int p = 0; p < pairs; ++p) {
        store_lanes(pair[p].state.top, top[p][0], top[p][1]);
        store_lanes(pair[p].state.low, low[p][0], low[p][1]);
        store_lanes(pair[p].state.fill, _mm256_and_si256(fill[p][0], lanes16(15)),
                    _mm256_and_si256(fill[p][1], lanes16(15)));
        for (int h = 0; h < 2; ++h) pair[p].next[h] = next[p][h];
    }
}

template <bool narrow>
void decode_ranks_avx2(const DecodeTables& decode, DecodePair* pair, int pairs, int64_t rows, bool values,
                       uint8_t* ranks) {
    const int steps = decode.code.longest - decode.code.shortest;
    if (pairs == 2)
        steps <= 8 ? decode_ranks_avx2<2, 8, narrow>(decode, pair, rows, values, ranks)
                   : decode_ranks_avx2<2, 14, narrow>(decode, pair, rows, values, ranks);
    else
        steps <= 8 ? decode_ranks_avx2<1, 8, narrow>(decode, pair, rows, values, ranks)
                   : decode_ranks_avx2<1, 14, narrow>(decode, pair, rows, values, ranks);
}

// Turns `count` ranks of 8 bits, a multiple of 128, into symbols. A shuffle takes the low four bits of a byte that is
// not negative: table t answers for all ranks from 16 t on to the next 128, and takes back what table t - 1 has said.
PLATONIC_INLINE void look_up_bytes(const DecodeTables& decode, uint8_t* ranks, int64_t count) {
    const __m256i sixteen = _mm256_set1_epi8(16);
    const int tables = (decode.code.used + 15) / 16;
    for (int64_t at = 0; at < count; at += 128) {
        __m256i found[4], index[4];
        for (int k = 0; k < 4; ++k) {
            index[k] = load256(ranks + at + 32 * k);
            found[k] = _mm256_setzero_si256();
        }
        for (int t = 0; t < tables; ++t) {
            const __m256i table = load256(decode.byte_symbols[t]);
            if (t == 8)
                for (int k = 0; k < 4; ++k)
                    index[k] = _mm256_xor_si256(load256(ranks + at + 32 * k), _mm256_set1_epi8(-128));
            for (int k = 0; k < 4; ++k) {
                found[k] = _mm256_xor_si256(found[k], _mm256_shuffle_epi8(table, index[k]));
                index[k] = _mm256_subs_epi8(index[k], sixteen);
            }
        }
        for (int k = 0; k < 4; ++k) store256(ranks + at + 32 * k, found[k]);
    }
}

// The same for ranks of 16 bits.
PLATONIC_INLINE void look_up_words(const DecodeTables& decode, uint16_t* ranks, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) {
            uint32_t symbol = decode.symbols[ranks[i + k]];
            keep_scalar(symbol);
            ranks[i + k] = static_cast<uint16_t>(symbol);
        }
    }
}

// Eight symbols of 8 or 16 bits.
PLATONIC_INLINE __m128i load_eight(const uint8_t* p) {
    return _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
PLATONIC_INLINE __m128i load_eight(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
PLATONIC_INLINE __m256i widen_eight(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
PLATONIC_INLINE __m256i widen_eight(const uint16_t* p) { return _mm256_cvtepu16_epi32(load_eight(p)); }

struct StoreSymbolsAvx2 {
    static constexpr bool values = false;

    template <class T>
    PLATONIC_INLINE void operator()(const DecodePair& pair, int half, int64_t at, const T* symbols) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(pair.symbols[half] + at), load_eight(symbols));
    }
};

template <bool accumulate>
struct StoreValuesAvx2 {
    static constexpr bool values = true;
    __m256 first, step, scale;

    template <class T>
    PLATONIC_INLINE void operator()(const DecodePair& pair, int half, int64_t at, const T* symbols) const {
        float* out = pair.values[half] + at;
        __m256 value = _mm256_add_ps(first, _mm256_mul_ps(step, _mm256_cvtepi32_ps(widen_eight(symbols))));
        if (accumulate) value = _mm256_add_ps(_mm256_loadu_ps(out), _mm256_mul_ps(scale, value));
        _mm256_storeu_ps(out, value);
    }
};

template <class T, class Store>
PLATONIC_INLINE void store_rows(const T* symbols, const DecodePair* pair, int pairs, int64_t rows, const Store& store) {
    for (int p = 0; p < pairs; ++p) {
        const DecodePair to = pair[p];
        for (int64_t row = 0; row < rows; ++row) {
            const T* from = symbols + (row * pairs + p) * pair_lanes;
            for (int part = 0; part < 4; ++part) {
                const int half = sizeof(T) == 1 ? part % 2 : part / 2, eight = sizeof(T) == 1 ? part / 2 : part % 2;
                store(to, half, row * stream_lanes + 8 * eight, from + 8 * part);
            }
        }
    }
}

template <class Store>
void decode_any_avx2(const DecodeTables& decode, DecodePair* pair, int pairs, int64_t rows, const Store& store) {
    const int64_t count = rows * pairs * pair_lanes;
    alignas(32) uint16_t ranks[most_pairs * chunk_rows * pair_lanes];
    uint8_t* bytes = reinterpret_cast<uint8_t*>(ranks);
    if (decode.bytes) {
        decode_ranks_avx2<true>(decode, pair, pairs, rows, store.values, bytes);
        look_up_bytes(decode, bytes, (count + 127) / 128 * 128);
        return store_rows(bytes, pair, pairs, rows, store);
    }
    decode_ranks_avx2<false>(decode, pair, pairs, rows, store.values, bytes);
    look_up_words(decode, ranks, count);
    store_rows(ranks, pair, pairs, rows, store);
}

PLATONIC_INLINE void decode_values_avx2(const DecodeTables& tables, DecodePair* pair, int pairs, int64_t rows,
                                        const Dequantizer<float>& z, bool accumulate, float scale) {
    const __m256 first = _mm256_set1_ps(z.first), step = _mm256_set1_ps(z.step);
    if (accumulate)
        decode_any_avx2(tables, pair, pairs, rows, StoreValuesAvx2<true>{first, step, _mm256_set1_ps(scale)});
    else
        decode_any_avx2(tables, pair, pairs, rows, StoreValuesAvx2<false>{first, step, first});
}

// ---- encoding ----

// Lanes as _mm256_packus_epi32 leaves them: 0 to 3, 8 to 11, 4 to 7, 12 to 15. Entries in this order need not be
// permuted once more when two registers of them become one of codes and one of powers.
struct LoadSymbolsAvx2 {
    PLATONIC_INLINE __m256i operator()(const EncodePair& pair, int half, int64_t back) const {
        return _mm256_permute4x64_epi64(load256(pair.symbols[half] - back * stream_lanes), 0xd8);
    }
};

struct LoadValuesAvx2 {
    __m256 low, factor;
    __m256i last;

    PLATONIC_INLINE __m256i operator()(const EncodePair& pair, int half, int64_t back) const {
        const float* x = pair.values[half] - back * stream_lanes;
        __builtin_prefetch(x - 512);
        const __m256i a = _mm256_cvttps_epi32(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x), low), factor));
        const __m256i b = _mm256_cvttps_epi32(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + 8), low), factor));
        return _mm256_min_epu16(_mm256_packus_epi32(a, b), last);  // see quantize_all
    }
};

// Entries of the last `rows` rows, last first, 16 of the first block and 16 of the second. Encoding 194 levels on a
// Cascade Lake with mitigated gathers takes 1.35 ns a symbol with these look-ups and 2.8 with _mm256_i32gather_epi32.
template <class Load>
void load_entries_avx2(const EncodeTables& encode, const EncodePair& pair, int64_t rows, const Load& load,
                       uint32_t* entries) {
    const EncodePair from = pair;
    alignas(32) uint16_t symbols[chunk_rows * pair_lanes];
    for (int64_t row = 0; row < rows; ++row)
        for (int h = 0; h < 2; ++h) store256(symbols + row * pair_lanes + h * stream_lanes, load(from, h, row + 1));
    for (int64_t i = 0; i < rows * pair_lanes; i += 8) {
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
            uint32_t entry = encode.powers[symbols[i + k]];
            keep_scalar(entry);
            entries[i + k] = entry;
        }
    }
}

void encode_entries_avx2(EncodePair& pair, int64_t rows, const uint32_t* entries) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i top[2], low[2], power[2];  // power: 2^fill
    uint32_t* next[2];
    for (int h = 0; h < 2; ++h) {
        top[h] = load_lanes(pair.state.top, h);
        low[h] = load_lanes(pair.state.low, h);
        const __m256i fill = load_lanes(pair.state.fill, h);
        power[h] = _mm256_shuffle_epi8(
            power_table(), _mm256_add_epi8(_mm256_or_si256(fill, _mm256_slli_epi16(fill, 8)), lanes16(0x0800)));
        next[h] = pair.next[h];
    }
    for (int64_t row = 0; row < rows; ++row) {
        __m256i full[2], out[2];
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const __m256i a = load256(entries + row * pair_lanes + h * stream_lanes);
            const __m256i b = load256(entries + row * pair_lanes + h * stream_lanes + 8);
            const __m256i code =
                _mm256_packus_epi32(_mm256_blend_epi16(a, zero, 0xaa), _mm256_blend_epi16(b, zero, 0xaa));
            const __m256i longer = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
            // One of the two is zero: the low where the lane gives its low word away.
            const __m256i within = _mm256_mullo_epi16(power[h], longer), beyond = _mm256_mulhi_epu16(power[h], longer);
            full[h] = _mm256_cmpeq_epi16(within, zero);
            const __m256i merged = _mm256_or_si256(top[h], _mm256_mullo_epi16(code, power[h]));
            const __m256i over = _mm256_mulhi_epu16(code, power[h]);  // zero where not full
            out[h] = low[h];
            low[h] = _mm256_blendv_epi8(low[h], merged, full[h]);
            top[h] = _mm256_or_si256(over, _mm256_andnot_si256(full[h], merged));
            power[h] = _mm256_or_si256(within, beyond);
        }
        const uint32_t sets = negative_lanes(full[0], full[1]);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const uint32_t below = sets >> (8 * h) & 255, above = sets >> (16 + 8 * h) & 255;
            const __m256i words =
                _mm256_shuffle_epi8(out[h], load_halves(lane_shuffles.compress[below], lane_shuffles.compress[above]));
            const __m256i first = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(words, 1));
            const __m256i second = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(words));
            store256(next[h], _mm256_slli_epi32(first, 16 * h));
            store256(next[h] + __builtin_popcount(above), _mm256_slli_epi32(second, 16 * h));
            next[h] += __builtin_popcount(sets & (0x00ff00ffu << (8 * h)));
        }
    }
    store_lanes(pair.state.top, top[0], top[1]);
    store_lanes(pair.state.low, low[0], low[1]);
    store_lanes(pair.state.fill, power[0], power[1]);
    for (uint16_t& fill : pair.state.fill) fill = static_cast<uint16_t>(__builtin_ctz(fill));
    for (int h = 0; h < 2; ++h) pair.next[h] = next[h];
}

template <class Load>
void encode_rows_avx2(const EncodeTables& encode, EncodePair& pair, int64_t rows, const Load& load) {
    alignas(32) uint32_t entries[chunk_rows * pair_lanes];
    load_entries_avx2(encode, pair, rows, load, entries);
    encode_entries_avx2(pair, rows, entries);
}

PLATONIC_INLINE void encode_values_avx2(const EncodeTables& encode, EncodePair& pair, int64_t rows,
                                        const Quantizer<float>& z) {
    encode_rows_avx2(encode, pair, rows,
                     LoadValuesAvx2{_mm256_set1_ps(z.low), _mm256_set1_ps(z.factor), lanes16(encode.last)});
}

}  // namespace
}  // namespace PLATONIC_ISA
}  // namespace platonic
