// Compressing, second half: sizes of blocks, the header, and the blocks at their final places.
//
// encode_coded is the inverse of decode_coded in device_decode.cuh: a half warp codes a block, a lane of the warp per
// lane of the stream, from the last row to the first. Per row and lane that is a look-up in shared memory, which waits
// for nothing, and a chain of five or so operations and a ballot, which say where the row's words go: about 25
// instructions. A GiB of float32 has 4,096 blocks, so 16 warps on each of an H200's 132 multiprocessors, four for each
// of its schedulers: enough that instructions, not latencies, set the pace, 4,096 rows x 4 x 25 cycles = 0.24 ms. With
// both passes over the values (0.5 ms), the sizes (0.13 ms) and the checksums (0.1 ms), about 1 ms a GiB.
#pragma once

#include "weight_compression/device_checksum.cuh"
#include "weight_compression/device_plan.cuh"

namespace platonic {
namespace cuda {
namespace {

// ---- sizes ----

// What symbols are read from: memory that holds them.
template <class Symbol>
struct StoredSymbols {
    const Symbol* symbols;

    __device__ uint32_t operator[](int64_t i) const { return symbols[i]; }
    // i, ..., i + 3; those beyond the size are anything.
    __device__ uint4 quad(int64_t i, int64_t) const {
        if (sizeof(Symbol) == 2) {
            const uint2 two = *reinterpret_cast<const uint2*>(symbols + i);
            return make_uint4(two.x & 0xffff, two.x >> 16, two.y & 0xffff, two.y >> 16);
        }
        const uint32_t four = *reinterpret_cast<const uint32_t*>(symbols + i);
        return make_uint4(four & 255, four >> 8 & 255, four >> 16 & 255, four >> 24);
    }
};

// A lane of b bits writes b / 16 words: it starts with 16 bits, ends with 16 to 31, and gives 16 away at a time.
// The bytes of a block, in the first thread; `lengths` are in shared memory.
template <class Symbols>
__device__ uint32_t measure_block(const Symbols& symbols, int64_t size, const uint8_t* lengths) {
    __shared__ uint32_t bits[stream_lanes];
    if (threadIdx.x < stream_lanes) bits[threadIdx.x] = 0;
    __syncthreads();
    uint32_t sums[4] = {0, 0, 0, 0};  // of lanes 4 (t % 4) to 4 (t % 4) + 3
#pragma unroll 4
    for (int64_t i = 4 * threadIdx.x; i < size; i += 4 * grid_threads) {
        const uint4 s = symbols.quad(i, size);
        sums[0] += lengths[s.x];
        if (i + 1 < size) sums[1] += lengths[s.y];
        if (i + 2 < size) sums[2] += lengths[s.z];
        if (i + 3 < size) sums[3] += lengths[s.w];
    }
    for (int k = 0; k < 4; ++k) {
        for (int apart = 4; apart < 32; apart *= 2) sums[k] += __shfl_xor_sync(full_warp, sums[k], apart);
        if (threadIdx.x % 32 < 4) atomicAdd(&bits[4 * (threadIdx.x % 4) + k], sums[k]);
    }
    __syncthreads();
    uint32_t words = 0;
    for (int l = 0; l < stream_lanes; ++l) words += bits[l] / 16;
    return static_cast<uint32_t>(block_state_bytes) + 2 * words;
}

__global__ void __launch_bounds__(grid_threads) measure_blocks(int64_t n, bool again, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    if (!plan.quantised || !plan.is(Mode::entropy) || (again && !plan.again)) return;
    __shared__ uint8_t lengths[max_coded_levels];
    const int64_t first = blockIdx.x * block_symbols, size = symbols_of_block(n, blockIdx.x);
    for (int s = threadIdx.x; s < plan.levels; s += grid_threads) lengths[s] = scratch.code.lengths[s];
    uint32_t bytes;
    if (plan.levels > 256)
        bytes = measure_block(StoredSymbols<uint16_t>{static_cast<const uint16_t*>(scratch.symbols) + first}, size,
                              lengths);
    else
        bytes =
            measure_block(StoredSymbols<uint8_t>{static_cast<const uint8_t*>(scratch.symbols) + first}, size, lengths);
    if (threadIdx.x == 0) scratch.block_bytes[blockIdx.x] = bytes;
}

// ---- the header ----

__device__ inline void put_start(const CompressCall& call, const CompressPlan& plan) {
    uint8_t* const out = call.out;
    put(out, payload_magic);
    out[4] = payload_version;
    out[5] = static_cast<uint8_t>(plan.mode);
    out[6] = static_cast<uint8_t>(call.x.dtype);
    out[7] = static_cast<uint8_t>(call.x.shape.dimensions);
    put(out + 8, plan.total);
    for (int d = 0; d < call.x.shape.dimensions; ++d) put(out + start_bytes + 8 * d, call.x.shape.sizes[d]);
}

// What modes fixed and entropy have of their own, but for the code lengths and the ranges of groups.
__device__ inline void put_quantiser(const CompressCall& call, const CompressPlan& plan, uint8_t* own) {
    put(own, plan.lo);
    put(own + 8, plan.hi);
    put(own + 16, static_cast<uint32_t>(plan.levels));
    put(own + 20, static_cast<float>(plan.entropy));
    put(own + 24, static_cast<uint16_t>(plan.length_bytes));
    put(own + 26, static_cast<uint16_t>(call.group_size > 0 ? grouped_flag : plan.clamped ? escaped_flag : 0));
    if (call.group_size > 0) put(own + quantiser_bytes + plan.length_bytes, call.group_size);
}

// What a mode has of its own, by all threads of a block; returns its bytes.
__device__ inline int64_t put_own(const CompressCall& call, const CompressPlan& plan, const CompressScratch& scratch,
                                  Mode mode) {
    uint8_t* const own = call.out + own_begin(call.x.shape.dimensions);
    const int64_t item = call.x.item;
    const auto copy = [](const uint8_t* from, int64_t size, uint8_t* to) {
        for (int64_t i = threadIdx.x; i < size; i += single_threads) to[i] = from[i];
        return size;
    };
    switch (mode) {
        case Mode::raw:
            break;
        case Mode::constant:
            return copy(static_cast<const uint8_t*>(call.x.data), item, own);
        case Mode::fixed:
        case Mode::entropy:
            if (threadIdx.x == 0) put_quantiser(call, plan, own);
            copy(scratch.code.packed, plan.length_bytes, own + quantiser_bytes);
            return quantiser_own(plan.length_bytes, group_count(call.x.n, call.group_size), item);
        case Mode::planes: {
            const int width = unit_width(call.x.dtype, item);
            int64_t bytes = plane_bytes * width;
            for (int p = 0; p < width; ++p) {
                const PlanePlan& plane = plan.planes[p];
                if (threadIdx.x == 0) {
                    own[plane_bytes * p] = static_cast<uint8_t>(plane.kind);
                    own[plane_bytes * p + 1] = static_cast<uint8_t>(plane.value);
                    put(own + plane_bytes * p + 2, static_cast<uint16_t>(plane.length_bytes));
                }
                bytes += copy(scratch.code_of_plane(p).packed, plane.length_bytes, own + bytes);
            }
            return bytes;
        }
    }
    return 0;
}

// Bytes of block b without escapes.
__device__ inline int64_t block_size(const CompressCall& call, const CompressPlan& plan, const CompressScratch& scratch,
                                     Mode mode, int64_t b) {
    const int64_t n = call.x.n, item = call.x.item;
    if (mode == Mode::raw) return smaller(raw_block_bytes, n * item - b * raw_block_bytes);
    if (mode == Mode::fixed) return fixed_block_bytes(symbols_of_block(n, b), plan.bits);
    if (mode == Mode::entropy) return scratch.block_bytes[b];
    const int64_t units = unit_count(call.x.dtype, n), of_plane = b % block_count(units);
    for (int p = 0; p < unit_width(call.x.dtype, item); ++p) {
        const PlanePlan& plane = plan.planes[p];
        if (plane.kind == static_cast<int>(PlaneKind::raw) && plane.first == b - of_plane)
            return symbols_of_block(units, of_plane);
    }
    return scratch.block_bytes[b];
}

// Everything before the data but checksums and ranges, and where the blocks go.
__global__ void __launch_bounds__(single_threads) lay_out(CompressCall call, CompressScratch scratch) {
    CompressPlan& plan = *scratch.plan;
    if (plan.refused) return;
    const int64_t n = call.x.n, item = call.x.item;
    const Mode mode = call.way == Way::exact && n == 1 ? Mode::constant : static_cast<Mode>(plan.mode);
    const bool escaped = plan.has_escapes();
    const int dimensions = call.x.shape.dimensions, each = entry_bytes(escaped);
    const int64_t blocks = mode == Mode::constant ? 0
                           : mode == Mode::raw    ? raw_blocks(n * item)
                           : mode == Mode::planes ? plan.blocks
                                                  : block_count(n);
    const int64_t own = put_own(call, plan, scratch, mode);
    uint8_t* const table = call.out + own_begin(dimensions) + own;
    int64_t written = 0;
    for (int64_t first = 0; first < blocks; first += single_threads) {
        const int64_t b = first + threadIdx.x;
        int64_t bytes = 0, beside = 0, total;
        if (b < blocks) bytes = block_size(call, plan, scratch, mode, b);
        if (b < blocks && escaped) beside = scratch.escapes[b] * (2 + item);
        const int64_t offset = written + exclusive_sum<single_threads>(bytes + beside, &total);
        if (b < blocks) {
            put(table + each * b, static_cast<uint32_t>(bytes + beside));
            if (escaped) put(table + each * b + 8, scratch.escapes[b]);
            scratch.block_bytes[b] = static_cast<uint32_t>(bytes);
            scratch.offsets[b] = offset;
        }
        written += total;
    }
    __syncthreads();  // all have read plan.mode
    if (threadIdx.x != 0) return;
    plan.mode = static_cast<int>(mode);
    plan.blocks = blocks;
    plan.table = own_begin(dimensions) + own;
    plan.data = data_begin(dimensions, own, blocks, escaped);
    plan.total = plan.data + written;
    put_start(call, plan);
}

// ---- blocks ----

constexpr int coding_threads = 128;
constexpr int coding_blocks = coding_threads / stream_lanes;  // payload blocks of a thread block
constexpr int group_rows = 8;                                 // rows whose symbols are loaded together

// Words are stored at any address, odd ones byte by byte: the length of the header has no alignment.
__device__ __forceinline__ void put_word(uint8_t* at, uint32_t word, bool even) {
    if (even) {
        *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(word);
    } else {
        at[0] = static_cast<uint8_t>(word);
        at[1] = static_cast<uint8_t>(word >> 8);
    }
}

// A lane's symbols of the rows from `row` on; beyond the block's end `none`, which has no code.
template <class Symbols>
__device__ __forceinline__ void load_rows(const Symbols& symbols, int row, int lane, int size, uint32_t none,
                                          uint32_t (&to)[group_rows]) {
#pragma unroll
    for (int r = 0; r < group_rows; ++r) {
        const int i = (row + r) * stream_lanes + lane;
        to[r] = i < size ? symbols[i] : none;
    }
}

// One block by the half warp that calls; `bytes` is its size. Both halves of a warp do as many rows. `changes`: the
// symbols may no longer be the ones that were measured, because another thread changes the tensor: words for which
// there is no room are not stored.
template <bool changes, class Symbols>
__device__ void encode_block(const Symbols& symbols, int size, uint32_t none, const uint32_t* codes, uint8_t* out,
                             int64_t bytes) {
    const int lane = threadIdx.x % stream_lanes, half = threadIdx.x & 16;
    const uint32_t below = (1u << lane) - 1;
    const bool even = reinterpret_cast<uintptr_t>(out) % 2 == 0;
    const int other = __shfl_xor_sync(full_warp, size, 16), longer = size > other ? size : other;
    if (longer == 0) return;
    const int groups = (longer + group_rows * stream_lanes - 1) / (group_rows * stream_lanes);
    uint8_t* next = out + bytes;
    uint32_t bits = 0, ahead[group_rows], entries[group_rows];
    int fill = 16;
    load_rows(symbols, (groups - 1) * group_rows, lane, size, none, ahead);
    for (int g = groups - 1; g >= 0; --g) {
#pragma unroll
        for (int r = 0; r < group_rows; ++r) entries[r] = codes[ahead[r]];
        if (g > 0) load_rows(symbols, (g - 1) * group_rows, lane, size, none, ahead);
#pragma unroll
        for (int r = group_rows - 1; r >= 0; --r) {
            const int length = static_cast<int>(entries[r] >> 16);
            const bool full = fill + length >= 32;
            const uint32_t giving = __ballot_sync(full_warp, full) >> half & 0xffff;
            next -= 2 * __popc(giving);
            if (full) {
                uint8_t* const at = next + 2 * __popc(giving & below);
                if (!changes || at >= out + block_state_bytes) put_word(at, bits, even);
                bits >>= 16;
                fill -= 16;
            }
            bits |= (entries[r] & 0xffff) << fill;
            fill += length;
        }
    }
    if (size > 0) put(out + 4 * lane, bits | 1u << fill);
}

__global__ void __launch_bounds__(coding_threads) encode_coded(CompressCall call, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    if (!plan.is(Mode::entropy)) return;
    __shared__ uint32_t codes[max_coded_levels + 1];
    for (int s = threadIdx.x; s < plan.levels; s += coding_threads) codes[s] = scratch.code.codes[s];
    constexpr uint32_t none = max_coded_levels;
    if (threadIdx.x == 0) codes[none] = 0;
    __syncthreads();
    const int64_t b = int64_t{blockIdx.x} * coding_blocks + threadIdx.x / stream_lanes;
    const int64_t place = b * block_symbols;
    const bool any = b < plan.blocks;
    const int size = any ? static_cast<int>(symbols_of_block(call.x.n, b)) : 0;
    uint8_t* const out = call.out + plan.data + (any ? scratch.offsets[b] : 0);
    const int64_t bytes = any ? scratch.block_bytes[b] : 0;
    if (plan.levels > 256)
        encode_block<false>(StoredSymbols<uint16_t>{static_cast<const uint16_t*>(scratch.symbols) + place}, size, none,
                            codes, out, bytes);
    else
        encode_block<false>(StoredSymbols<uint8_t>{static_cast<const uint8_t*>(scratch.symbols) + place}, size, none,
                            codes, out, bytes);
}

// A thread packs eight symbols, which are as many whole bytes as a symbol has bits.
__global__ void __launch_bounds__(grid_threads) encode_fixed(CompressCall call, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    if (!plan.is(Mode::fixed)) return;
    const int bits = plan.bits;
    const bool wide = plan.levels > 256;
    for (int64_t i = 8 * first_thread(); i < call.x.n; i += 8 * all_threads()) {
        uint8_t* p = call.out + plan.data + scratch.offsets[i / block_symbols] + i % block_symbols / 8 * bits;
        const int64_t size = smaller(8, call.x.n - i);
        uint32_t held = 0;
        int fill = 0;
        for (int k = 0; k < size; ++k) {
            const uint32_t symbol = wide ? static_cast<const uint16_t*>(scratch.symbols)[i + k]
                                         : static_cast<const uint8_t*>(scratch.symbols)[i + k];
            held |= symbol << fill;
            fill += bits;
            for (; fill >= 8; fill -= 8, held >>= 8) *p++ = static_cast<uint8_t>(held);
        }
        if (fill > 0) *p = static_cast<uint8_t>(held);
    }
}

__global__ void __launch_bounds__(grid_threads) encode_raw(CompressCall call, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    if (!plan.is(Mode::raw)) return;
    copy_bytes(static_cast<const uint8_t*>(call.x.data), call.out + plan.data, call.x.n * call.x.item);
}

// ---- checksums ----

__global__ void __launch_bounds__(crc32c_threads) seal_blocks(CompressCall call, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    if (plan.refused) return;
    const bool escaped = plan.has_escapes();
    for (int64_t b = blockIdx.x; b < plan.blocks; b += gridDim.x) {
        const int64_t bytes = scratch.block_bytes[b] + (escaped ? scratch.escapes[b] * (2 + call.x.item) : 0);
        const uint32_t checksum = checksum_block(call.out + plan.data + scratch.offsets[b], bytes);
        if (threadIdx.x == 0) put(call.out + plan.table + entry_bytes(escaped) * b + 4, checksum);
    }
}

__global__ void __launch_bounds__(crc32c_threads) seal_header(CompressCall call, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    if (!plan.refused) {
        const uint32_t checksum = checksum_block(call.out, plan.data - 4);
        if (threadIdx.x == 0) put(call.out + plan.data - 4, checksum);
    }
    if (threadIdx.x == 0) *call.size = plan.refused ? -1 : plan.total;
}

}  // namespace
}  // namespace cuda
}  // namespace platonic
