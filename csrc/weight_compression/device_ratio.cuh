// Compressing to a ratio: entropy.py's search for the most levels that fit. Each try counts all values in the levels it
// is about and makes their code, which says how many bits they take.
#pragma once

#include "weight_compression/device_code.cuh"

namespace platonic {
namespace cuda {
namespace {

constexpr int ratio_tries = 8;

__device__ inline int64_t levels_to_try(const RatioSearch& search) {
    int64_t levels = levels_of_bits(search.guess);
    if (levels < search.best) levels = search.best;
    return levels < search.most ? levels : search.most;
}

// The levels of the first try. `beside` are the bytes of ranges and escapes; the entropy is that of 2^entropy_bits
// bins.
__device__ inline int64_t first_levels(const CompressCall& call, CompressPlan& plan, int64_t beside) {
    RatioSearch& search = plan.search;
    const double bits = static_cast<double>(8 * call.x.item) / call.value;
    search.bits = bits - static_cast<double>(8 * beside) / static_cast<double>(call.x.n);
    search.guess = search.bits - (plan.entropy - static_cast<double>(call.entropy_bits));
    search.best = 2;
    search.most = max_coded_levels;
    search.tries = 0;
    search.searching = 1;
    return levels_to_try(search);
}

// What follows from a try of plan.levels that took so many bits a value; false if the search is over.
__device__ inline bool continue_search(CompressPlan& plan, double found) {
    RatioSearch& search = plan.search;
    const int64_t levels = plan.levels;
    if (found <= search.bits) {
        search.best = levels;
        if (found > 0.99 * search.bits) return false;
    } else {
        search.most = levels - 1;
    }
    if (search.best >= search.most || ++search.tries == ratio_tries) return false;
    // Twice the levels take about one bit more.
    const double low = exact_log2(static_cast<double>(search.best)),
                 high = exact_log2(static_cast<double>(search.most));
    double guess = exact_log2(static_cast<double>(levels)) + search.bits - found;
    guess = low > guess ? low : guess;
    guess = high < guess ? high : guess;
    const int64_t next = levels_of_bits(guess);
    // Where the estimate stands still between the two, halve their distance.
    if (next == search.best || next == levels)
        guess = exact_log2(static_cast<double>(search.best + search.most + 1) / 2.0);
    search.guess = guess;
    plan.levels = levels_to_try(search);
    return true;
}

__global__ void __launch_bounds__(single_threads) judge_levels(CompressCall call, CompressScratch scratch) {
    CompressPlan& plan = *scratch.plan;
    if (!plan.quantised || !plan.search.searching) return;
    __shared__ CodeShared shared;
    const int levels = static_cast<int>(plan.levels);
    int64_t bits = call.x.n * fixed_bits(levels);
    const int used = sort_symbols(scratch.counts, levels, false, shared.keys);
    if (used >= 2) {
        const int64_t coded = find_lengths(scratch.code, shared, levels, used);
        const int64_t with_code = coded + 8 * pack_code(scratch.code, shared, levels);
        bits = with_code < bits ? with_code : bits;
    }
    for (int s = threadIdx.x; s < levels; s += single_threads) scratch.counts[s] = 0;
    if (threadIdx.x != 0) return;
    if (continue_search(plan, static_cast<double>(bits) / static_cast<double>(call.x.n))) return;
    plan.search.searching = 0;
    plan.levels = plan.search.best;
    plan.bits = fixed_bits(plan.levels);
}

}  // namespace
}  // namespace cuda
}  // namespace platonic
