// Decompressing, first half: the header, read as hostile as it may be. One thread block checks what payload.py checks
// and builds the tables that blocks are decoded by; ranges of groups, of which there may be many, are left to a grid.
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
enum Fault : int32_t { fault_header = 1, fault_code = 2, fault_ranges = 4, fault_checksum = 8, fault_block = 16 };

// A plane of bytes in mode planes.
struct StoredPlane {
    int kind, value, length_bytes;
    int64_t packed, first;  // where its code lengths begin; its first block
};

struct DecompressPlan {
    int mode, bits, length_bytes, escaped;
    int64_t levels, table, data, blocks;
    double lo, hi;
    int64_t group_size, groups, ranges;  // where those of the groups begin; without groups, 0 of them
    int64_t units;                       // values, or in mode planes what that takes apart
    StoredPlane planes[max_planes];
    int longest[max_planes];  // code of a plane; in mode entropy, the first
};

struct DecompressScratch {
    DecompressPlan* plan;
    uint8_t* lengths;   // [max_coded_levels]
    uint16_t* by_rank;  // [max_coded_levels]: symbols in the order of their codes
    uint16_t* tables;   // [planes][table_size]: symbol * 16 + length by the next `longest` bits
    uint32_t* sizes;    // [blocks], escapes included
    uint32_t* escapes;  // [blocks], where the payload has any
    int64_t* offsets;   // [blocks]
    int64_t size;

    DecompressScratch(void* begin, int dtype, int64_t item, int64_t n) {
        Arena arena(begin);
        const int width = unit_width(dtype, item);
        const int64_t blocks = width * block_count(unit_count(dtype, n));  // of all planes: no mode has more
        plan = arena.take<DecompressPlan>(1);
        lengths = arena.take<uint8_t>(max_coded_levels);
        by_rank = arena.take<uint16_t>(max_coded_levels);
        tables = arena.take<uint16_t>(width * table_size);
        sizes = arena.take<uint32_t>(blocks);
        escapes = arena.take<uint32_t>(blocks);
        offsets = arena.take<int64_t>(blocks);
        size = arena.used() - static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin));
    }

    // Of block b, without its escapes.
    __device__ int64_t symbol_bytes(const DecompressPlan& p, int64_t item, int64_t b) const {
        return sizes[b] - (p.escaped ? escapes[b] * (2 + item) : 0);
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

// The fields of fixed and entropy modes from `at` on; false if one has a value that no writer gives it.
__device__ inline bool parse_quantiser(const DecompressCall& call, int64_t at, DecompressPlan& plan, int64_t* bytes) {
    if (call.size - at < quantiser_bytes) return false;
    const uint8_t* const own = call.payload + at;
    const DType dtype = static_cast<DType>(call.out.dtype);
    const bool coded = plan.mode == static_cast<int>(Mode::entropy);
    const int64_t n = call.out.n;
    plan.lo = get<double>(own);
    plan.hi = get<double>(own + 8);
    plan.levels = get<uint32_t>(own + 16);
    plan.length_bytes = get<uint16_t>(own + 24);
    const float entropy = get<float>(own + 20);
    const int flags = get<uint16_t>(own + 26);
    if (call.out.dtype > static_cast<int>(DType::bfloat16) || n == 0) return false;
    if (!is_value_of(dtype, plan.lo) || !is_value_of(dtype, plan.hi) || !(plan.lo < plan.hi)) return false;
    if (is_minus_zero(plan.lo) || is_minus_zero(plan.hi)) return false;
    if (plan.levels < 2 || plan.levels > (coded ? max_coded_levels : max_levels)) return false;
    if (!(entropy >= 0.0f && entropy <= 64.0f)) return false;
    if (coded ? plan.length_bytes > plan.levels / 2 + 1 : plan.length_bytes != 0) return false;
    if (flags != 0 && flags != grouped_flag && flags != escaped_flag) return false;
    plan.bits = fixed_bits(plan.levels);
    plan.escaped = flags == escaped_flag;
    if (flags == grouped_flag) {
        plan.ranges = at + quantiser_bytes + plan.length_bytes + 8;
        if (plan.ranges > call.size) return false;
        const uint64_t size = get<uint64_t>(call.payload + plan.ranges - 8);
        if (size == 0 || size >= static_cast<uint64_t>(n)) return false;
        plan.group_size = static_cast<int64_t>(size);
        plan.groups = group_count(n, plan.group_size);
    }
    *bytes = quantiser_own(plan.length_bytes, plan.groups, call.out.item);
    return true;
}

// Those of mode planes; the code lengths themselves come later.
__device__ inline bool parse_planes(const DecompressCall& call, int64_t at, DecompressPlan& plan, int64_t* bytes) {
    const int width = unit_width(call.out.dtype, call.out.item);
    if (call.out.n == 0 || call.size - at < plane_bytes * width) return false;
    plan.units = unit_count(call.out.dtype, call.out.n);
    int64_t packed = at + plane_bytes * width, stored = 0;
    for (int p = 0; p < width; ++p) {
        const uint8_t* const own = call.payload + at + plane_bytes * p;
        StoredPlane& plane = plan.planes[p];
        plane.kind = own[0];
        plane.value = own[1];
        plane.length_bytes = get<uint16_t>(own + 2);
        if (plane.kind > static_cast<int>(PlaneKind::coded)) return false;
        const bool constant = plane.kind == static_cast<int>(PlaneKind::constant);
        const bool coded = plane.kind == static_cast<int>(PlaneKind::coded);
        if ((plane.value != 0 && !constant) || plane.length_bytes > (coded ? 256 / 2 + 1 : 0)) return false;
        plane.packed = packed;
        plane.first = stored * block_count(plan.units);
        packed += plane.length_bytes;
        stored += !constant;
    }
    plan.blocks = stored * block_count(plan.units);
    *bytes = packed - at;
    return stored > 0;
}

// Everything up to the block table, and whether the table fits; one thread.
__device__ inline bool parse_fields(const DecompressCall& call, DecompressPlan& plan) {
    const uint8_t* const p = call.payload;
    const DeviceArray& out = call.out;
    const int dimensions = out.shape.dimensions;
    const int64_t own = own_begin(dimensions);
    if (call.size < own || get<uint32_t>(p) != payload_magic || p[4] != payload_version) return false;
    if (p[5] > static_cast<int>(Mode::planes) || p[6] != out.dtype || p[7] != dimensions) return false;
    if (get<uint64_t>(p + 8) != static_cast<uint64_t>(call.size)) return false;
    for (int d = 0; d < dimensions; ++d)
        if (get<int64_t>(p + start_bytes + 8 * d) != out.shape.sizes[d]) return false;
    plan.mode = p[5];
    plan.length_bytes = 0;
    plan.escaped = 0;
    plan.group_size = 0;
    plan.groups = 0;
    plan.units = out.n;
    plan.blocks = block_count(out.n);
    int64_t bytes = 0;
    switch (static_cast<Mode>(plan.mode)) {
        case Mode::raw:
            plan.blocks = raw_blocks(out.n * out.item);
            break;
        case Mode::constant:
            if (out.n == 0) return false;
            plan.blocks = 0;
            bytes = out.item;
            break;
        case Mode::fixed:
        case Mode::entropy:
            if (!parse_quantiser(call, own, plan, &bytes)) return false;
            break;
        case Mode::planes:
            if (!parse_planes(call, own, plan, &bytes)) return false;
            break;
    }
    plan.table = own + bytes;
    plan.data = data_begin(dimensions, bytes, plan.blocks, plan.escaped);
    return plan.data <= call.size;
}

// Whether a block of so many bytes, without escapes, may be number b.
__device__ inline bool allowed_bytes(const DecompressCall& call, const DecompressPlan& plan, int64_t bytes, int64_t b) {
    int kind = static_cast<int>(PlaneKind::coded);
    int64_t within = b;  // its plane
    switch (static_cast<Mode>(plan.mode)) {
        case Mode::raw:
            return bytes == smaller(raw_block_bytes, call.out.n * call.out.item - b * raw_block_bytes);
        case Mode::constant:
            return false;
        case Mode::fixed:
            return bytes == fixed_block_bytes(symbols_of_block(plan.units, b), plan.bits);
        case Mode::entropy:
            break;
        case Mode::planes:
            for (int p = 0; p < unit_width(call.out.dtype, call.out.item); ++p) {
                const StoredPlane& plane = plan.planes[p];
                if (plane.kind == static_cast<int>(PlaneKind::constant) || plane.first > b) continue;
                kind = plane.kind;
                within = b - plane.first;
            }
            break;
    }
    if (kind == static_cast<int>(PlaneKind::raw)) return bytes == symbols_of_block(plan.units, within);
    return bytes >= block_state_bytes && bytes <= max_block_bytes && bytes % 2 == 0;
}

// Sizes and offsets of the blocks; false unless they are allowed and fill the payload.
__device__ inline bool parse_blocks(const DecompressCall& call, const DecompressPlan& plan, DecompressScratch scratch) {
    const int each = entry_bytes(plan.escaped);
    int64_t sum = 0;
    int bad = 0;
    for (int64_t first = 0; first < plan.blocks; first += parse_threads) {
        const int64_t b = first + threadIdx.x;
        const uint8_t* const entry = call.payload + plan.table + each * b;
        int64_t bytes = 0, total;
        if (b < plan.blocks) bytes = get<uint32_t>(entry);
        const int64_t offset = sum + exclusive_sum<parse_threads>(bytes, &total);
        if (b < plan.blocks) {
            const int64_t escapes = plan.escaped ? get<uint32_t>(entry + 8) : 0;
            bad |= escapes > block_symbols || !allowed_bytes(call, plan, bytes - escapes * (2 + call.out.item), b);
            scratch.sizes[b] = static_cast<uint32_t>(bytes);
            scratch.offsets[b] = offset;
            scratch.escapes[b] = static_cast<uint32_t>(escapes);
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
__device__ inline bool build_table(DecompressScratch scratch, int levels, uint16_t* table, int* longest) {
    __shared__ int32_t of_length[max_code_length + 2], next[max_code_length + 2];
    __shared__ CanonicalCode code;
    __shared__ bool complete;
    count_lengths<parse_threads>(scratch.lengths, levels, of_length);
    if (threadIdx.x == 0) {
        complete = make_canonical_from_counts(of_length, &code);
        for (int l = 1; l <= max_code_length; ++l) next[l] = complete ? code.first_rank[l] : 0;
        *longest = code.longest;
    }
    __syncthreads();
    if (!complete) return false;
    if (threadIdx.x < 32)
        for_each_code(scratch.lengths, levels, next,
                      [&](int s, int, int rank) { scratch.by_rank[rank] = static_cast<uint16_t>(s); });
    __syncthreads();
    for (int i = threadIdx.x; i < 1 << code.longest; i += parse_threads) {
        int length = code.shortest;
        while (i >> (code.longest - length) >= code.first_code[length] + of_length[length]) ++length;
        const int rank = code.first_rank[length] + (i >> (code.longest - length)) - code.first_code[length];
        table[i] = static_cast<uint16_t>(scratch.by_rank[rank] << 4 | length);
    }
    return true;
}

// The tables of all codes.
__device__ inline bool parse_codes(const DecompressCall& call, DecompressPlan& plan, DecompressScratch scratch) {
    const auto parse = [&](int64_t packed, int bytes, int levels, int p) {
        return unpack_code(call.payload + packed, bytes, levels, scratch.lengths) &&
               build_table(scratch, levels, scratch.tables + p * table_size, &plan.longest[p]);
    };
    if (plan.mode == static_cast<int>(Mode::entropy))
        return parse(own_begin(call.out.shape.dimensions) + quantiser_bytes, plan.length_bytes,
                     static_cast<int>(plan.levels), 0);
    if (plan.mode != static_cast<int>(Mode::planes)) return true;
    for (int p = 0; p < unit_width(call.out.dtype, call.out.item); ++p) {
        const StoredPlane& plane = plan.planes[p];
        if (plane.kind == static_cast<int>(PlaneKind::coded) && !parse(plane.packed, plane.length_bytes, 256, p))
            return false;
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
    if (fault == 0 && !parse_codes(call, plan, scratch)) fault = fault_code;
    if (threadIdx.x == 0) *call.status = fault;
}

// The ranges of groups, which have to be finite and to ascend, and are never -0.
template <class T>
__global__ void __launch_bounds__(grid_threads) check_ranges(DecompressCall call, DecompressScratch scratch) {
    const DecompressPlan& plan = *scratch.plan;
    if (*call.status & ~fault_ranges) return;
    bool bad = false;
    for (int64_t g = first_thread(); g < plan.groups; g += all_threads()) {
        const auto range = stored_range<T>(call.payload + plan.ranges, g);
        const bool finite = range.lo - range.lo == 0 && range.hi - range.hi == 0;
        bad |= !finite || !(range.lo <= range.hi) || is_minus_zero(range.lo) || is_minus_zero(range.hi);
    }
    if (bad) atomicOr(call.status, fault_ranges);
}

}  // namespace
}  // namespace cuda
}  // namespace platonic
