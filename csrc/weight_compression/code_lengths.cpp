// Package-merge (Larmore and Hirschberg, 1990) in its boundary form's plain ancestor: one merged list per bit of the
// limit, of which only the way the elements alternate is kept (symbol or package), 2 m flags a level. Walking the
// levels back from the deepest list tells how many of the lightest symbols each level takes.
#include "weight_compression/code_lengths.h"

#include <algorithm>
#include <vector>

namespace platonic {

constexpr int symbol_bits = 12;  // counts, even 64 times those of 2^40 values, fit above
static_assert(max_coded_levels == 1 << symbol_bits, "symbols do not fit");

void code_lengths(const int64_t* counts, int64_t levels, uint8_t* lengths) {
    const int limit = length_limit(levels);
    // Counts and, of equal ones, symbols in ascending order.
    std::vector<uint64_t> order;
    order.reserve(levels);
    for (int64_t s = 0; s < levels; ++s) {
        lengths[s] = 0;
        if (counts[s] > 0) order.push_back(static_cast<uint64_t>(counts[s]) << symbol_bits | static_cast<uint64_t>(s));
    }
    std::sort(order.begin(), order.end());
    const size_t m = order.size();
    constexpr int64_t last = INT64_MAX;  // behind the end of a list
    std::vector<int64_t> weights(m + 1, last), pairs(m + 1, last), merged(2 * m);
    for (size_t i = 0; i < m; ++i) weights[i] = static_cast<int64_t>(order[i] >> symbol_bits);
    // Level by level, from the longest codes: merge the symbols with the pairs of the level before.
    std::vector<uint8_t> is_symbol(limit * 2 * m);
    size_t paired = 0;
    for (int level = 0; level < limit; ++level) {
        uint8_t* const flags = &is_symbol[level * 2 * m];
        size_t symbol = 0, pair = 0;
        for (size_t i = 0; i < m + paired; ++i) {
            const bool take = weights[symbol] <= pairs[pair];
            merged[i] = take ? weights[symbol] : pairs[pair];
            flags[i] = take;
            symbol += take;
            pair += !take;
        }
        paired = (m + paired) / 2;
        for (size_t i = 0; i < paired; ++i) pairs[i] = merged[2 * i] + merged[2 * i + 1];
        pairs[paired] = last;
    }
    // The lightest 2m - 2 elements of the last list are the solution; each package opens two of the list below.
    size_t taken = 2 * m - 2;
    for (int level = limit - 1; level >= 0 && taken > 0; --level) {
        const uint8_t* const flags = &is_symbol[level * 2 * m];
        size_t symbols = 0;
        for (size_t i = 0; i < taken; ++i) symbols += flags[i];
        for (size_t i = 0; i < symbols; ++i) ++lengths[order[i] & (max_coded_levels - 1)];
        taken = 2 * (taken - symbols);
    }
}

int64_t sample_code(const int64_t* counts, int64_t levels, int64_t n, uint8_t* lengths) {
    std::vector<int64_t> weights(levels);
    for (int64_t s = 0; s < levels; ++s) weights[s] = sample_weight * counts[s] + 1;
    code_lengths(weights.data(), levels, lengths);
    SampleCode sample{0, 0, 0};
    for (int64_t s = 0; s < levels; ++s) sample.take(counts[s], lengths[s]);
    return sample_code_bits(sample, levels, n);
}

}  // namespace platonic
