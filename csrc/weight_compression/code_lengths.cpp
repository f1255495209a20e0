// Package-merge (Larmore and Hirschberg, 1990) in its boundary form's plain ancestor: one merged list per bit of the
// limit, of which only the way the elements alternate is kept (symbol or package), 2 m flags a level. Walking the
// levels back from the deepest list tells how many of the lightest symbols each level takes.
#include "weight_compression/code_lengths.h"

#include <algorithm>
#include <vector>

namespace platonic {

void code_lengths(const int64_t* counts, int64_t levels, uint8_t* lengths) {
    const int limit = length_limit(levels);
    std::vector<int32_t> order;
    for (int64_t s = 0; s < levels; ++s) {
        lengths[s] = 0;
        if (counts[s] > 0) order.push_back(static_cast<int32_t>(s));
    }
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return counts[a] < counts[b]; });
    const size_t m = order.size();
    // Level by level, from the longest codes: merge the symbols with the pairs of the level before.
    std::vector<std::vector<bool>> is_symbol(limit);
    std::vector<int64_t> list, merged;
    for (int level = 0; level < limit; ++level) {
        merged.clear();
        size_t symbol = 0, pair = 0;
        const size_t pairs = list.size() / 2;
        while (symbol < m || pair < pairs) {
            const bool take =
                pair == pairs || (symbol < m && counts[order[symbol]] <= list[2 * pair] + list[2 * pair + 1]);
            merged.push_back(take ? counts[order[symbol]] : list[2 * pair] + list[2 * pair + 1]);
            take ? ++symbol : ++pair;
            is_symbol[level].push_back(take);
        }
        list.swap(merged);
    }
    // The lightest 2m - 2 elements of the last list are the solution; each package opens two of the list below.
    size_t taken = 2 * m - 2;
    for (int level = limit - 1; level >= 0 && taken > 0; --level) {
        size_t symbols = 0;
        for (size_t i = 0; i < taken; ++i) symbols += is_symbol[level][i];
        for (size_t i = 0; i < symbols; ++i) ++lengths[order[i]];
        taken = 2 * (taken - symbols);
    }
}

}  // namespace platonic
