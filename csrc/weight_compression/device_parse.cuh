// Decompressing, first half: the header, read as hostile as it may be. One thread block checks what payload.py checks
// and builds the table that blocks are decoded by.
#pragma once

#include "weight_compression/device_checksum.cuh"
#include "weight_compression/device_code.cuh"

namespace platonic {
namespace cuda {
namespace {

constexpr int table_size = 1 << max_code_length;
constexpr int parse_threads = crc32c_threads;

// What the status becomes; the host finds out more by decoding on the CPU. The first two are the header's, and nothing
// else is looked at after them; the others are set by one block while others may be starting.
enum Fault : int32_t { fault_header = 1, fault_code = 2, fault_checksum = 4, fault_block = 8 };

struct DecompressPlan {
    int mode, bits, length_bytes;
    int64_t levels, data, blocks;
    double lo, hi;
    CanonicalCode code;
};

struct DecompressScratch {
    DecompressPlan* plan;
    uint8_t* lengths;   // [max_coded_levels]
    uint16_t* by_rank;  // [max_coded_levels]: symbols in the order of their codes
    uint16_t* table;    // [table_size]: symbol * 16 + length by the next `longest` bits
    uint32_t* sizes;    // [blocks]
    int64_t* offsets;   // [blocks]
    int64_t size;

    DecompressScratch(void* begin, int64_t n) {
        Arena arena(begin);
        plan = arena.take<DecompressPlan>(1);
        lengths = arena.take<uint8_t>(max_coded_levels);
        by_rank = arena.take<uint16_t>(max_coded_levels);
        table = arena.take<uint16_t>(table_size);
        sizes = arena.take<uint32_t>(block_count(n));
        offsets = arena.take<int64_t>(block_count(n));
        size = arena.used() - static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin));
    }
};

__device__ inline bool is_value_of(DType dtype, double x) {
    if (!(x - x == 0.0)) return false;
    if (dtype == DType::float64) return true;
    const float single = static_cast<float>(x);
    if (!(single - single == 0.0f) || static_cast<double>(single) != x) return false;
    if (dtype == DType::float16) return half_to_float(float_to_half(single)) == single;
    return dtype != DType::bfloat16 || bfloat_to_float(float_to_bfloat(single)) == single;
}

__device__ inline bool is_minus_zero(double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    return bits == uint64_t{1} << 63;
}

// The fields of fixed and entropy modes; false if one has a value that no writer gives it.
__device__ inline bool parse_quantiser(const DecompressCall& call, const uint8_t* own, DecompressPlan& plan) {
    const DType dtype = static_cast<DType>(call.out.dtype);
    const bool coded = plan.mode == static_cast<int>(Mode::entropy);
    plan.lo = get<double>(own);
    plan.hi = get<double>(own + 8);
    plan.levels = get<uint32_t>(own + 16);
    plan.length_bytes = get<uint16_t>(own + 24);
    const float entropy = get<float>(own + 20);
    if (call.out.dtype > static_cast<int>(DType::bfloat16) || call.out.n == 0) return false;
    if (!is_value_of(dtype, plan.lo) || !is_value_of(dtype, plan.hi) || !(plan.lo < plan.hi)) return false;
    if (is_minus_zero(plan.lo) || is_minus_zero(plan.hi)) return false;
    if (plan.levels < 2 || plan.levels > (coded ? max_coded_levels : max_levels)) return false;
    if (!(entropy >= 0.0f && entropy <= 64.0f) || get<uint16_t>(own + 26) != 0) return false;
    plan.bits = fixed_bits(plan.levels);
    return coded ? plan.length_bytes <= plan.levels / 2 + 1 : plan.length_bytes == 0;
}

// Everything up to the block table, and whether the table fits; one thread.
__device__ inline bool parse_fields(const DecompressCall& call, DecompressPlan& plan) {
    const uint8_t* const p = call.payload;
    const DeviceArray& out = call.out;
    const int dimensions = out.shape.dimensions;
    int64_t needed = own_begin(dimensions);
    if (call.size < needed || get<uint32_t>(p) != payload_magic || p[4] != payload_version) return false;
    if (p[5] > static_cast<int>(Mode::entropy) || p[6] != out.dtype || p[7] != dimensions) return false;
    if (get<uint64_t>(p + 8) != static_cast<uint64_t>(call.size)) return false;
    for (int d = 0; d < dimensions; ++d)
        if (get<int64_t>(p + start_bytes + 8 * d) != out.shape.sizes[d]) return false;
    plan.mode = p[5];
    plan.length_bytes = 0;
    const Mode mode = static_cast<Mode>(plan.mode);
    if (mode == Mode::constant && out.n == 0) return false;
    if (mode == Mode::fixed || mode == Mode::entropy) {
        if (call.size < needed + quantiser_bytes || !parse_quantiser(call, p + needed, plan)) return false;
    }
    plan.blocks = payload_blocks(mode, out.n, out.item);
    plan.data = data_begin(mode, dimensions, out.n, out.item, plan.length_bytes);
    return plan.data <= call.size;
}

// Sizes and offsets of the blocks; false unless they are allowed and fill the payload.
__device__ inline bool parse_blocks(const DecompressCall& call, const DecompressPlan& plan, DecompressScratch scratch) {
    const Mode mode = static_cast<Mode>(plan.mode);
    const uint8_t* const table = call.payload + plan.data - 4 - table_entry_bytes * plan.blocks;
    int64_t sum = 0;
    int bad = 0;
    for (int64_t first = 0; first < plan.blocks; first += parse_threads) {
        const int64_t b = first + threadIdx.x;
        int64_t bytes = 0, total;
        if (b < plan.blocks) bytes = get<uint32_t>(table + table_entry_bytes * b);
        const int64_t offset = sum + exclusive_sum<parse_threads>(bytes, &total);
        if (b < plan.blocks && mode == Mode::entropy) {
            bad |= bytes < block_state_bytes || bytes > max_block_bytes || bytes % 2 != 0;
            scratch.sizes[b] = static_cast<uint32_t>(bytes);
            scratch.offsets[b] = offset;
        } else if (b < plan.blocks) {
            bad |= bytes != plain_block_bytes(mode, b, call.out.n, call.out.item, plan.bits);
        }
        sum += total;
    }
    return __syncthreads_or(bad || sum != call.size - plan.data) == 0;
}

// unpack_lengths of code_lengths.h, for all nibbles at once. A nibble is the number of a run where an odd number of
// 15s, the last of them its escape, comes right before it: what ends a row of 15s settles what the next nibble is.
__device__ inline bool unpack_code(const uint8_t* packed, int bytes, int levels, uint8_t* lengths) {
    __shared__ uint32_t fifteen[mask_words + 2];
    const int nibbles = 2 * bytes;  // at most max_coded_levels + 2
    const auto nibble_at = [&](int i) { return packed[i / 2] >> (4 * (i % 2)) & 15; };
    for (int i = threadIdx.x; i < (nibbles + 31) / 32 * 32; i += parse_threads) {
        const uint32_t mask = __ballot_sync(full_warp, i < nibbles && nibble_at(i) == 15);
        if (i % 32 == 0) fifteen[i / 32] = mask;
    }
    for (int s = threadIdx.x; s < levels; s += parse_threads) lengths[s] = 0;
    __syncthreads();
    int64_t symbols = 0;  // described by the nibbles of earlier rounds
    int bad = nibbles == 0, padded = 0;
    for (int first = 0; first < nibbles; first += parse_threads) {
        const int i = first + static_cast<int>(threadIdx.x);
        int advance = 0;
        const int value = i < nibbles ? nibble_at(i) : 0;
        bool number = false;
        if (i < nibbles) {
            int word = i / 32;
            uint32_t others = ~fifteen[word] & ((1u << i % 32) - 1);
            while (others == 0 && word > 0) others = ~fifteen[--word];
            const int last = others == 0 ? -1 : 32 * word + 31 - __clz(others);  // that is not 15
            number = (i - 1 - last) % 2 == 1;
            advance = number ? value + 2 : value < 15;
        }
        int64_t total;
        const int64_t s = symbols + exclusive_sum<parse_threads>(advance, &total);
        symbols += total;
        if (i < nibbles && !number && value < 15 && s < levels) lengths[s] = static_cast<uint8_t>(value);
        if (i == nibbles - 1) {
            padded = !number && value == 0;
            bad |= !number && value == 15;  // an escape without its number
        }
    }
    // All nibbles describe the symbols, or all but the last, which is a zero of padding.
    padded = __syncthreads_or(padded);
    bad |= symbols != levels && !(padded && symbols == levels + 1);
    return __syncthreads_or(bad) == 0;
}

// The decoder's table, entry by entry: the code that an index begins with has the first length whose codes go up to it.
__device__ inline bool build_table(DecompressPlan& plan, DecompressScratch scratch) {
    __shared__ int32_t of_length[max_code_length + 2], next[max_code_length + 2];
    __shared__ bool complete;
    const int levels = static_cast<int>(plan.levels);
    count_lengths<parse_threads>(scratch.lengths, levels, of_length);
    if (threadIdx.x == 0) {
        complete = make_canonical_from_counts(of_length, &plan.code);
        for (int l = 1; l <= max_code_length; ++l) next[l] = complete ? plan.code.first_rank[l] : 0;
    }
    __syncthreads();
    if (!complete) return false;
    if (threadIdx.x < 32)
        for_each_code(scratch.lengths, levels, next,
                      [&](int s, int, int rank) { scratch.by_rank[rank] = static_cast<uint16_t>(s); });
    __syncthreads();
    const CanonicalCode code = plan.code;
    for (int i = threadIdx.x; i < 1 << code.longest; i += parse_threads) {
        int length = code.shortest;
        while (i >> (code.longest - length) >= code.first_code[length] + of_length[length]) ++length;
        const int rank = code.first_rank[length] + (i >> (code.longest - length)) - code.first_code[length];
        scratch.table[i] = static_cast<uint16_t>(scratch.by_rank[rank] << 4 | length);
    }
    return true;
}

__global__ void __launch_bounds__(parse_threads) parse_header(DecompressCall call, DecompressScratch scratch) {
    DecompressPlan& plan = *scratch.plan;
    __shared__ bool good;
    if (threadIdx.x == 0) good = parse_fields(call, plan);
    __syncthreads();
    int32_t fault = good ? 0 : fault_header;
    if (fault == 0 && checksum_block(call.payload, plan.data - 4) != get<uint32_t>(call.payload + plan.data - 4))
        fault = fault_header;
    if (fault == 0 && !parse_blocks(call, plan, scratch)) fault = fault_header;
    if (fault == 0 && plan.mode == static_cast<int>(Mode::entropy)) {
        const uint8_t* packed = call.payload + own_begin(call.out.shape.dimensions) + quantiser_bytes;
        const int levels = static_cast<int>(plan.levels);
        if (!unpack_code(packed, plan.length_bytes, levels, scratch.lengths) || !build_table(plan, scratch))
            fault = fault_code;
    }
    if (threadIdx.x == 0) *call.status = fault;
}

}  // namespace
}  // namespace cuda
}  // namespace platonic
