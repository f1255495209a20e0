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

// The quad of symbols that begins at i.
__device__ __forceinline__ uint4 symbol_quad(const void* symbols, int64_t i, bool wide) {
    if (wide) {
        const uint2 two = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(symbols) + i);
        return make_uint4(two.x & 0xffff, two.x >> 16, two.y & 0xffff, two.y >> 16);
    }
    const uint32_t four = *reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(symbols) + i);
    return make_uint4(four & 255, four >> 8 & 255, four >> 16 & 255, four >> 24);
}

// A lane of b bits writes b / 16 words: it starts with 16 bits, ends with 16 to 31, and gives 16 away at a time.
__global__ void __launch_bounds__(grid_threads) measure_blocks(int64_t n, bool again, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    if (!plan.is(Mode::entropy) || (again && !plan.again)) return;
    __shared__ uint8_t lengths[max_coded_levels];
    __shared__ uint32_t bits[stream_lanes];
    const bool wide = plan.levels > 256;
    const int64_t first = blockIdx.x * block_symbols, size = symbols_of_block(n, blockIdx.x);
    for (int s = threadIdx.x; s < plan.levels; s += grid_threads) lengths[s] = scratch.lengths[s];
    if (threadIdx.x < stream_lanes) bits[threadIdx.x] = 0;
    __syncthreads();
    uint32_t sums[4] = {0, 0, 0, 0};  // of lanes 4 (t % 4) to 4 (t % 4) + 3
#pragma unroll 4
    for (int64_t i = 4 * threadIdx.x; i < size; i += 4 * grid_threads) {
        const uint4 s = symbol_quad(scratch.symbols, first + i, wide);
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
    if (threadIdx.x != 0) return;
    uint32_t words = 0;
    for (int l = 0; l < stream_lanes; ++l) words += bits[l] / 16;
    scratch.block_bytes[blockIdx.x] = static_cast<uint32_t>(block_state_bytes) + 2 * words;
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
    uint8_t* const own = out + own_begin(call.x.shape.dimensions);
    if (plan.mode == static_cast<int>(Mode::constant)) {
        for (int64_t i = 0; i < call.x.item; ++i) own[i] = static_cast<const uint8_t*>(call.x.data)[i];
    } else if (plan.mode != static_cast<int>(Mode::raw)) {
        put(own, plan.lo);
        put(own + 8, plan.hi);
        put(own + 16, static_cast<uint32_t>(plan.levels));
        put(own + 20, static_cast<float>(plan.entropy));
        put(own + 24, static_cast<uint16_t>(plan.length_bytes));
        put(own + 26, static_cast<uint16_t>(0));
    }
}

// Everything before the data but checksums, and where the blocks go.
__global__ void __launch_bounds__(single_threads) lay_out(CompressCall call, CompressScratch scratch) {
    CompressPlan& plan = *scratch.plan;
    if (plan.refused) return;
    const int64_t n = call.x.n, item = call.x.item;
    const Mode mode = !call.quantise && n == 1 ? Mode::constant : static_cast<Mode>(plan.mode);
    const int dimensions = call.x.shape.dimensions, length_bytes = plan.length_bytes;
    const int64_t blocks = mode == Mode::constant ? 0 : mode == Mode::raw ? raw_blocks(n * item) : block_count(n);
    const int64_t own = mode == Mode::raw ? 0 : mode == Mode::constant ? item : quantiser_own(length_bytes, 0, item);
    uint8_t* const table = call.out + own_begin(dimensions) + own;
    int64_t written = 0;
    for (int64_t first = 0; first < blocks; first += single_threads) {
        const int64_t b = first + threadIdx.x;
        int64_t bytes = 0, total;
        if (b < blocks)
            bytes = mode == Mode::raw     ? smaller(raw_block_bytes, n * item - b * raw_block_bytes)
                    : mode == Mode::fixed ? fixed_block_bytes(symbols_of_block(n, b), plan.bits)
                                          : scratch.block_bytes[b];
        const int64_t offset = written + exclusive_sum<single_threads>(bytes, &total);
        if (b < blocks) {
            put(table + entry_bytes(false) * b, static_cast<uint32_t>(bytes));
            scratch.block_bytes[b] = static_cast<uint32_t>(bytes);
            scratch.offsets[b] = offset;
        }
        written += total;
    }
    for (int i = threadIdx.x; i < length_bytes; i += single_threads)
        table[i - length_bytes] = scratch.packed[i];  // the code lengths end where the table begins
    __syncthreads();                                  // all have read plan.mode
    if (threadIdx.x != 0) return;
    plan.mode = static_cast<int>(mode);
    plan.table = own_begin(dimensions) + own;
    plan.blocks = blocks;
    plan.data = data_begin(dimensions, own, blocks, false);
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

// A lane's symbols of the rows from `row` on; beyond the block's end one that has no code.
template <class Symbol>
__device__ __forceinline__ void load_rows(const Symbol* symbols, int row, int lane, int size,
                                          uint32_t (&to)[group_rows]) {
#pragma unroll
    for (int r = 0; r < group_rows; ++r) {
        const int i = (row + r) * stream_lanes + lane;
        to[r] = i < size ? symbols[i] : static_cast<uint32_t>(max_coded_levels);
    }
}

// One block by the half warp that calls; `bytes` is its size. Both halves of a warp do as many rows.
template <class Symbol>
__device__ void encode_block(const Symbol* symbols, int size, const uint32_t* codes, uint8_t* out, int64_t bytes) {
    const int lane = threadIdx.x % stream_lanes, half = threadIdx.x & 16;
    const uint32_t below = (1u << lane) - 1;
    const bool even = reinterpret_cast<uintptr_t>(out) % 2 == 0;
    const int other = __shfl_xor_sync(full_warp, size, 16), longer = size > other ? size : other;
    if (longer == 0) return;
    const int groups = (longer + group_rows * stream_lanes - 1) / (group_rows * stream_lanes);
    uint8_t* next = out + bytes;
    uint32_t bits = 0, ahead[group_rows], entries[group_rows];
    int fill = 16;
    load_rows(symbols, (groups - 1) * group_rows, lane, size, ahead);
    for (int g = groups - 1; g >= 0; --g) {
#pragma unroll
        for (int r = 0; r < group_rows; ++r) entries[r] = codes[ahead[r]];
        if (g > 0) load_rows(symbols, (g - 1) * group_rows, lane, size, ahead);
#pragma unroll
        for (int r = group_rows - 1; r >= 0; --r) {
            const int length = static_cast<int>(entries[r] >> 16);
            const bool full = fill + length >= 32;
            const uint32_t giving = __ballot_sync(full_warp, full) >> half & 0xffff;
            next -= 2 * __popc(giving);
            if (full) {
                put_word(next + 2 * __popc(giving & below), bits, even);
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
    for (int s = threadIdx.x; s < plan.levels; s += coding_threads) codes[s] = scratch.codes[s];
    if (threadIdx.x == 0) codes[max_coded_levels] = 0;
    __syncthreads();
    const int64_t b = int64_t{blockIdx.x} * coding_blocks + threadIdx.x / stream_lanes;
    const int64_t place = b * block_symbols;
    const bool any = b < block_count(call.x.n);
    const int size = any ? static_cast<int>(symbols_of_block(call.x.n, b)) : 0;
    uint8_t* const out = call.out + plan.data + (any ? scratch.offsets[b] : 0);
    const int64_t bytes = any ? scratch.block_bytes[b] : 0;
    if (plan.levels > 256)
        encode_block(static_cast<const uint16_t*>(scratch.symbols) + place, size, codes, out, bytes);
    else
        encode_block(static_cast<const uint8_t*>(scratch.symbols) + place, size, codes, out, bytes);
}

// A thread packs eight symbols, which are as many whole bytes as a symbol has bits.
__global__ void __launch_bounds__(grid_threads) encode_fixed(CompressCall call, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    if (!plan.is(Mode::fixed)) return;
    const int bits = plan.bits;
    const bool wide = plan.levels > 256;
    uint8_t* const out = call.out + plan.data;
    for (int64_t i = 8 * first_thread(); i < call.x.n; i += 8 * all_threads()) {
        uint8_t* p = out + i / 8 * bits;
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
    for (int64_t b = blockIdx.x; b < plan.blocks; b += gridDim.x) {
        const uint32_t checksum = checksum_block(call.out + plan.data + scratch.offsets[b], scratch.block_bytes[b]);
        if (threadIdx.x == 0) put(call.out + plan.table + entry_bytes(false) * b + 4, checksum);
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
