// Counting is bound by additions to memory, so pairs are counted: two symbols with one addition. Symbols i and i + 1
// together index a table of 16-bit counters, which is folded into `counts` before it can overflow. Two tables of single
// symbols, or eight, were slower: 41 ms for 64M values where pairs take 20.
#include "weight_compression/count_simd.h"

#include <cstring>

#include "common/simd.h"
#include "weight_compression/quantize_simd.h"

namespace platonic {
namespace PLATONIC_ISA {
namespace {

constexpr int64_t batch = 512;              // symbols whose pairs are made before they are counted
constexpr int64_t single_below = 32;        // symbols a level: folding pairs would take longer than counting them
constexpr int64_t fold_every = 126 * 1024;  // symbols: at most 65,535 pairs between folds

// Where the pairs of up to `batch` symbols are counted: first + stride * second.
struct Pairs {
    int64_t stride;
    alignas(64) uint32_t index[batch / 2];

    // An odd number of cache lines a row: rows spread over all sets of the cache.
    explicit Pairs(int64_t levels) : stride((levels + 31) / 32 * 32) {
        if (stride % 64 == 0) stride += 32;
    }

    void from_symbols(const uint16_t* symbols, int64_t count) {
        for (int64_t k = 0; k < count / 2; ++k) {
            uint32_t both;
            memcpy(&both, symbols + 2 * k, 4);
            index[k] = (both & 0xffff) + (both >> 16) * static_cast<uint32_t>(stride);
        }
    }

#if defined(__AVX512BW__)
    // The same of plain float32 values, without a stop in between; a whole number of 32.
    void from_values(const float* x, const Quantization& z, int64_t count) {
        const __m512 low = _mm512_set1_ps(z.single.low), factor = _mm512_set1_ps(z.single.factor);
        // Decides only where another thread changes the values: see symbol_of.
        const __m512i last = _mm512_set1_epi16(static_cast<int16_t>(z.scheme.levels - 1));
        const __m512i weights = _mm512_set1_epi32(static_cast<int32_t>(1 | stride << 16));
        for (int64_t k = 0; k < count; k += 32) {
            const __m512i a = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + k), low), factor));
            const __m512i b =
                _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + k + 16), low), factor));
            const __m512i symbols = _mm512_min_epu16(_mm512_packus_epi32(a, b), last);
            _mm512_store_si512(index + k / 2, _mm512_madd_epi16(symbols, weights));
        }
    }
#endif

    // `ahead`, if not null: what is going to be read soon.
    void count(int64_t size, uint16_t* table, const char* ahead) const {
        int64_t k = 0;
        for (; k + 16 <= size / 2; k += 16) {
            if (ahead) {
                __builtin_prefetch(ahead + 8 * k);
                __builtin_prefetch(ahead + 8 * k + 64);
            }
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j) ++table[index[k + j]];
        }
        for (; k < size / 2; ++k) ++table[index[k]];
    }

    // Adds the table to counts and leaves it as zeros.
    void fold(int64_t levels, uint16_t* table, int64_t* counts) const {
        uint32_t firsts[pair_levels] = {0};
        for (int64_t second = 0; second < levels; ++second) {
            uint16_t* row = table + second * stride;
            uint32_t total = 0;
            for (int64_t first = 0; first < levels; ++first) {
                total += row[first];
                firsts[first] += row[first];
            }
            counts[second] += total;
            memset(row, 0, levels * sizeof *row);
        }
        for (int64_t s = 0; s < levels; ++s) counts[s] += firsts[s];
    }
};

}  // namespace

void count_symbols(const Values& x, const Quantization& z, int64_t first, int64_t count, int64_t* counts,
                   uint8_t* counters) {
    const int64_t levels = z.scheme.levels;
    uint16_t symbols[batch];
    if (levels > pair_levels || count < single_below * levels) {
        for (int64_t i = 0; i < count; i += batch) {
            const int64_t size = count - i < batch ? count - i : batch;
            quantize_chunk(x, z, first + i, size, symbols);
            for (int64_t k = 0; k < size; ++k) ++counts[symbols[k]];
        }
        return;
    }
    uint16_t* table = reinterpret_cast<uint16_t*>(counters);
    Pairs pairs(levels);
    for (int64_t begin = 0; begin < count; begin += fold_every) {
        const int64_t end = begin + fold_every < count ? begin + fold_every : count;
        for (int64_t i = begin; i < end; i += batch) {
            const int64_t size = end - i < batch ? end - i : batch;
#if defined(__AVX512BW__)
            if (z.is_plain(x.dtype) && size == batch) {
                const float* values = static_cast<const float*>(x.data) + first + i;
                pairs.from_values(values, z, size);
                pairs.count(size, table, reinterpret_cast<const char*>(values + 1024));
                continue;
            }
#endif
            quantize_chunk(x, z, first + i, size, symbols);
            pairs.from_symbols(symbols, size);
            pairs.count(size, table, nullptr);
            if (size % 2) ++counts[symbols[size - 1]];
        }
        pairs.fold(levels, table, counts);
    }
}

}  // namespace PLATONIC_ISA
}  // namespace platonic
