// Compressing, in between: the optimal code of the symbols' numbers and the choice of the mode, in one thread block.
//
// Package-merge as in code_lengths.cpp. The symbols are sorted once (bitonic; the number of the symbol below its count
// breaks ties as a stable sort does). A level merges them with the packages of the level before: of every two
// neighbours in the merged list, a binary search along the merge's diagonal finds where they come from, so that all
// pairs of a level are made at once. Thirteen levels of 200 symbols are thirteen rounds of one pair a thread.
#pragma once

#include "weight_compression/device_plan.cuh"

namespace platonic {
namespace cuda {
namespace {

constexpr int symbol_bits = 12;
static_assert(max_coded_levels == 1 << symbol_bits, "a symbol's number fits below its count");
constexpr int mask_words = max_coded_levels / 32;

struct CodeShared {
    unsigned long long keys[max_coded_levels];  // count << symbol_bits | symbol, ascending; later nibbles
    uint32_t is_symbol[max_code_length][2 * mask_words];
    uint32_t occurs[mask_words];
    int32_t taken[max_code_length];
    int32_t of_length[max_code_length + 2];
    int32_t next[max_code_length + 2];
};

// Sorted keys of the symbols that occur, of a sample's counts all; returns how many occur.
__device__ inline int sort_symbols(const unsigned long long* counts, int levels, bool sampled,
                                   unsigned long long* keys) {
    int padded = 2, mine = 0;
    while (padded < levels) padded *= 2;
    for (int s = threadIdx.x; s < padded; s += single_threads) {
        const unsigned long long count = s < levels ? counts[s] : 0;
        const unsigned long long weight = sampled && s < levels ? sample_weight * count + 1 : count;
        keys[s] = weight > 0 ? weight << symbol_bits | static_cast<unsigned>(s) : ~0ull;
        mine += count > 0;
    }
    const int used = static_cast<int>(sum_over_block<single_threads>(mine));
    for (int size = 2; size <= padded; size *= 2) {
        for (int apart = size / 2; apart > 0; apart /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < padded / 2; i += single_threads) {
                const int a = 2 * i - (i & (apart - 1)), b = a + apart;
                const unsigned long long low = keys[a], high = keys[b];
                if ((low > high) == ((a & size) == 0)) {
                    keys[a] = high;
                    keys[b] = low;
                }
            }
        }
    }
    __syncthreads();
    return used;
}

// How many of the first `count` elements of the merged list are symbols. A symbol comes before a package of its weight.
__device__ inline int symbols_among(int count, const unsigned long long* keys, int used,
                                    const unsigned long long* packages, int pairs) {
    int low = count > pairs ? count - pairs : 0, high = count < used ? count : used;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (keys[middle] >> symbol_bits <= packages[count - 1 - middle])
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// Fills is_symbol, a bit an element, for every level.
__device__ inline void merge_packages(CodeShared& shared, int used, int limit, unsigned long long* packages) {
    constexpr int rounds = max_coded_levels / single_threads;
    int pairs = 0;
    for (int level = 0; level < limit; ++level) {
        const int elements = used + pairs;
        unsigned long long made[rounds];
        for (int k = 0; k < rounds; ++k) {
            const int pair = static_cast<int>(threadIdx.x) + k * single_threads;
            made[k] = 0;
            if (2 * pair >= elements) continue;
            int symbol = symbols_among(2 * pair, shared.keys, used, packages, pairs), package = 2 * pair - symbol;
            uint32_t bits = 0;
            for (int e = 0; e < 2 && 2 * pair + e < elements; ++e) {
                const unsigned long long weight = symbol < used ? shared.keys[symbol] >> symbol_bits : 0;
                if (package == pairs || (symbol < used && weight <= packages[package])) {
                    bits |= 1u << e;
                    made[k] += weight;
                    ++symbol;
                } else {
                    made[k] += packages[package++];
                }
            }
            atomicOr(&shared.is_symbol[level][pair / 16], bits << (2 * pair % 32));
        }
        __syncthreads();  // all have read the packages
        pairs = elements / 2;
        for (int k = 0; k < rounds; ++k) {
            const int pair = static_cast<int>(threadIdx.x) + k * single_threads;
            if (pair < pairs) packages[pair] = made[k];
        }
        __syncthreads();
    }
}

// How many of the lightest symbols each level takes, from the last level back; in the first warp.
__device__ inline void walk_back(CodeShared& shared, int used, int limit) {
    int taken = 2 * used - 2;
    for (int level = limit - 1; level >= 0; --level) {
        int symbols = 0;
        for (int word = threadIdx.x; 32 * word < taken; word += 32) {
            const int rest = taken - 32 * word;
            symbols += __popc(shared.is_symbol[level][word] & (rest < 32 ? (1u << rest) - 1 : full_warp));
        }
        for (int apart = 16; apart > 0; apart /= 2) symbols += __shfl_xor_sync(full_warp, symbols, apart);
        if (threadIdx.x == 0) shared.taken[level] = symbols;
        taken = 2 * (taken - symbols);
    }
}

// lengths[levels] of the code, and the bits of all symbols together.
__device__ inline int64_t find_lengths(const CodeRoom& room, CodeShared& shared, int levels, int used) {
    const int limit = length_limit(levels);
    for (int i = threadIdx.x; i < 2 * mask_words * max_code_length; i += single_threads)
        shared.is_symbol[i / (2 * mask_words)][i % (2 * mask_words)] = 0;
    for (int s = threadIdx.x; s < levels; s += single_threads) room.lengths[s] = 0;
    __syncthreads();
    merge_packages(shared, used, limit, room.packages);
    if (threadIdx.x < 32) walk_back(shared, used, limit);
    __syncthreads();
    int64_t bits = 0;
    for (int i = threadIdx.x; i < used; i += single_threads) {
        int length = 0;
        for (int level = 0; level < limit; ++level) length += shared.taken[level] > i;
        room.lengths[shared.keys[i] & (max_coded_levels - 1)] = static_cast<uint8_t>(length);
        bits += length * static_cast<int64_t>(shared.keys[i] >> symbol_bits);
    }
    return sum_over_block<single_threads>(bits);
}

// The run of symbols without a code that s, one of them, lies in.
__device__ inline void run_around(const uint32_t* occurs, int s, int levels, int* begin, int* end) {
    int word = s / 32;
    uint32_t bits = occurs[word] & ((1u << s % 32) - 1);
    while (bits == 0 && word > 0) bits = occurs[--word];
    *begin = bits == 0 ? 0 : 32 * word + 32 - __clz(bits);
    word = s / 32;
    bits = occurs[word] & ~((1u << s % 32) - 1);
    while (bits == 0 && word < (levels - 1) / 32) bits = occurs[++word];
    *end = bits == 0 ? levels : 32 * word + __ffs(bits) - 1;
}

// pack_lengths of code_lengths.h: what a symbol writes follows from its place in the run of zeros around it, where it
// writes it from the numbers of nibbles of those before. Returns the bytes.
__device__ inline int pack_code(const CodeRoom& room, CodeShared& shared, int levels) {
    uint8_t* nibbles = reinterpret_cast<uint8_t*>(shared.keys);
    for (int s = threadIdx.x; s < (levels + 31) / 32 * 32; s += single_threads) {
        const uint32_t occurs = __ballot_sync(full_warp, s < levels && room.lengths[s] > 0);
        if (s % 32 == 0) shared.occurs[s / 32] = occurs;
    }
    __syncthreads();
    int64_t written = 0;
    for (int first = 0; first < levels; first += single_threads) {
        const int s = first + static_cast<int>(threadIdx.x);
        int count = 0, run = 0;
        if (s < levels && room.lengths[s] > 0) {
            count = 1;
        } else if (s < levels) {
            int begin, end;
            run_around(shared.occurs, s, levels, &begin, &end);
            run = end - s < 17 ? end - s : 17;
            if ((s - begin) % 17 == 0) count = run >= 2 ? 2 : 1;
        }
        int64_t total;
        const int64_t place = written + exclusive_sum<single_threads>(count, &total);
        if (count == 1) nibbles[place] = room.lengths[s];
        if (count == 2) {
            nibbles[place] = 15;
            nibbles[place + 1] = static_cast<uint8_t>(run - 2);
        }
        written += total;
    }
    if (threadIdx.x == 0) nibbles[written] = 0;
    __syncthreads();
    const int bytes = static_cast<int>((written + 1) / 2);
    for (int i = threadIdx.x; i < bytes; i += single_threads)
        room.packed[i] = static_cast<uint8_t>(nibbles[2 * i] | nibbles[2 * i + 1] << 4);
    return bytes;
}

// Calls use(symbol, length, next[length] + how many symbols of its length come before it) for every symbol that has a
// code, in the first warp. next[] moves on.
template <class F>
__device__ void for_each_code(const uint8_t* lengths, int levels, int32_t* next, const F& use) {
    const uint32_t below = (1u << threadIdx.x) - 1;
    for (int first = 0; first < levels; first += 32) {
        const int s = first + static_cast<int>(threadIdx.x), length = s < levels ? lengths[s] : 0;
        const uint32_t same = __match_any_sync(full_warp, length);
        if (length > 0) use(s, length, next[length] + __popc(same & below));
        __syncwarp();
        if ((same & below) == 0) next[length] += __popc(same);
        __syncwarp();
    }
}

// of_length[l]: how many codes of length l there are; all threads call, each thread of the block.
template <int threads>
__device__ void count_lengths(const uint8_t* lengths, int levels, int32_t* of_length) {
    if (threadIdx.x < max_code_length + 2) of_length[threadIdx.x] = 0;
    __syncthreads();
    for (int s = threadIdx.x; s < levels; s += threads) atomicAdd(&of_length[lengths[s]], 1);
    __syncthreads();
}

__device__ inline void assign_codes(const CodeRoom& room, CodeShared& shared, int levels) {
    count_lengths<single_threads>(room.lengths, levels, shared.of_length);
    if (threadIdx.x == 0) {
        CanonicalCode code;
        make_canonical_from_counts(shared.of_length, &code);
        for (int l = 1; l <= max_code_length; ++l) shared.next[l] = code.first_code[l];
        shared.next[0] = 0;
    }
    for (int s = threadIdx.x; s < levels; s += single_threads) room.codes[s] = 0;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    for_each_code(room.lengths, levels, shared.next, [&](int s, int length, int code) {
        room.codes[s] = static_cast<uint32_t>(code) | static_cast<uint32_t>(length) << 16;
    });
}

// The code of `counts`, and its bytes in the header. Returns the bits of all n values, of a sample's code those that
// they may take; -1 if there is no code or that of the sample does not suffice.
__device__ inline int64_t make_code(const unsigned long long* counts, int levels, bool sampled, int64_t n,
                                    const CodeRoom& room, CodeShared& shared, int* packed) {
    __syncthreads();  // whatever was in `shared` has been used
    const int used = sort_symbols(counts, levels, sampled, shared.keys);
    if (used < 2) return -1;
    int64_t bits = find_lengths(room, shared, levels, sampled ? levels : used);
    if (sampled) {
        SampleCode mine{0, 0, 0};
        for (int s = threadIdx.x; s < levels; s += single_threads)
            mine.take(static_cast<int64_t>(counts[s]), room.lengths[s]);
        const SampleCode sample{sum_over_block<single_threads>(mine.size), sum_over_block<single_threads>(mine.bits),
                                sum_over_block<single_threads>(mine.unseen)};
        bits = sample_code_bits(sample, levels, n);
        if (bits < 0) return -1;
    }
    *packed = pack_code(room, shared, levels);
    assign_codes(room, shared, levels);
    return bits;
}

// Header and blocks of the payload that stores every value as it is.
__device__ inline int64_t raw_bytes(const CompressCall& call) {
    const int64_t bytes = call.x.n * call.x.item;
    return data_begin(call.x.shape.dimensions, 0, raw_blocks(bytes), false) + bytes;
}

// The mode with the smallest payload, of those the lowest; `bits` is that of a code or -1.
__device__ inline Mode smallest_mode(const CompressCall& call, const CompressPlan& plan, int64_t bits, int packed) {
    const int64_t n = call.x.n, item = call.x.item, groups = group_count(n, call.group_size);
    const int64_t escapes = static_cast<int64_t>(plan.escapes) * (2 + item);
    const auto with_header = [&](int64_t length_bytes, int64_t blocks) {
        return data_begin(call.x.shape.dimensions, quantiser_own(length_bytes, groups, item), block_count(n),
                          plan.clamped) +
               blocks + escapes;
    };
    Mode mode = Mode::raw;
    int64_t size = raw_bytes(call);
    const int64_t fixed = with_header(0, fixed_bytes(n, plan.bits));
    if (fixed < size) {
        mode = Mode::fixed;
        size = fixed;
    }
    return bits >= 0 && with_header(packed, coded_bytes_bound(n, bits)) < size ? Mode::entropy : mode;
}

// The code of all values, and what is smallest with it.
__device__ inline void choose_from_all(const CompressCall& call, const CompressScratch& scratch, CodeShared& shared) {
    CompressPlan& plan = *scratch.plan;
    int packed = 0;
    int64_t bits = -1;
    if (plan.levels <= max_coded_levels)
        bits = make_code(scratch.counts, static_cast<int>(plan.levels), false, call.x.n, scratch.code, shared, &packed);
    if (threadIdx.x != 0) return;
    const Mode mode = smallest_mode(call, plan, bits, packed);
    plan.mode = static_cast<int>(mode);
    plan.length_bytes = mode == Mode::entropy ? packed : 0;
    plan.room = -1;
}

__global__ void __launch_bounds__(single_threads) choose_mode(CompressCall call, CompressScratch scratch) {
    CompressPlan& plan = *scratch.plan;
    if (!plan.quantised) return;
    __shared__ CodeShared shared;
    if (call.try_sample && plan.levels <= max_coded_levels) {
        int packed = 0;
        const int64_t bits =
            make_code(scratch.sampled, static_cast<int>(plan.levels), true, call.x.n, scratch.code, shared, &packed);
        if (bits >= 0 && smallest_mode(call, plan, bits, packed) == Mode::entropy) {
            if (threadIdx.x != 0) return;
            plan.mode = static_cast<int>(Mode::entropy);
            plan.length_bytes = packed;
            plan.room = coded_bytes_bound(call.x.n, bits);
            return;
        }
    }
    choose_from_all(call, scratch, shared);
}

// Where the code of the sample takes more than it may, that of all values after all.
__global__ void __launch_bounds__(single_threads) reconsider_code(CompressCall call, CompressScratch scratch) {
    CompressPlan& plan = *scratch.plan;
    if (!plan.quantised || plan.room < 0) return;
    __shared__ CodeShared shared;
    int64_t mine = 0;
    for (int64_t b = threadIdx.x; b < block_count(call.x.n); b += single_threads) mine += scratch.block_bytes[b];
    const int64_t room = plan.room;
    if (sum_over_block<single_threads>(mine) <= room) return;
    choose_from_all(call, scratch, shared);
    if (threadIdx.x == 0) plan.again = 1;
}

}  // namespace
}  // namespace cuda
}  // namespace platonic
