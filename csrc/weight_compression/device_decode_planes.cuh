// Decompressing planes of bytes: a half warp puts together a block of units, which are written once, from the same
// block of every plane. Of coded planes it decodes eight rows at a time, one plane after the other; what it knows of
// each in between lies in local memory. Mostly a single plane is coded, the exponents': its table is in shared memory,
// those of others are read where they were built. Words are read as they come; a line of 64 of them lasts for 20 rows.
#pragma once

#include "weight_compression/device_decode.cuh"

namespace platonic {
namespace cuda {
namespace {

// What becomes of a unit: it is stored, ...
template <class U>
struct Stored {
    typedef U Unit;
    static constexpr bool adds = false;
    static __device__ Unit merge(Unit, double, Unit value) { return value; }
};
// ... or added.
template <class T>
struct Added {
    typedef typename T::Bits Bits;
    typedef typename UnsignedOf<sizeof(Bits)>::type Unit;
    static constexpr bool adds = true;
    static __device__ Unit merge(Unit old, double scale, Unit value) {
        Bits a, b;
        memcpy(&a, &old, sizeof a);
        memcpy(&b, &value, sizeof b);
        a = combine<T>(true, a, scale, b);
        memcpy(&old, &a, sizeof a);
        return old;
    }
};

// A block of a coded plane while it is being decoded: what a lane holds, and where the next words are.
struct PlaneLane {
    const uint8_t* words;
    int count, taken, fill;
    uint32_t bits;
};

__device__ inline PlaneLane start_lane(const uint8_t* block, int64_t bytes, int lane, bool* bad) {
    const uint32_t state = get<uint32_t>(block + 4 * lane);
    PlaneLane l{block + block_state_bytes, static_cast<int>((bytes - block_state_bytes) / 2), 0, 16, 0};
    *bad |= state < 0x10000;
    if (state < 0x10000) return l;
    l.fill = 31 - __clz(state);
    l.bits = state << (31 - l.fill) << 1;
    return l;
}

// The symbol of a row that begins `left` symbols before the block's end, for every lane; all lanes of the warp call.
__device__ __forceinline__ uint32_t decode_row(PlaneLane& l, const uint16_t* table, int longest, int left) {
    const int lane = threadIdx.x % stream_lanes, half = threadIdx.x & 16;
    const uint32_t entry = table[l.bits >> (32 - longest)];
    const int length = lane < left ? static_cast<int>(entry & 15) : 0;
    l.bits <<= length;
    l.fill -= length;
    const bool wants = l.fill < 16;
    const uint32_t taking = __ballot_sync(full_warp, wants) >> half & 0xffff;
    if (wants) {
        const int word = l.taken + __popc(taking & ((1u << lane) - 1));
        const uint8_t* const at = l.words + 2 * word;
        if (word < l.count) l.bits |= static_cast<uint32_t>(at[0] | at[1] << 8) << (16 - l.fill);
        l.fill += 16;
    }
    l.taken += __popc(taking);
    return entry >> 4;
}

template <class S>
__global__ void __launch_bounds__(decoding_threads) decode_planes(DecompressCall call, DecompressScratch scratch) {
    const DecompressPlan& plan = *scratch.plan;
    if ((*call.status & ~fault_block) != 0 || plan.mode != static_cast<int>(Mode::planes)) return;
    typedef typename S::Unit Unit;
    constexpr int width = sizeof(Unit), rows = decoded_rows;
    constexpr int raw = static_cast<int>(PlaneKind::raw), coded = static_cast<int>(PlaneKind::coded);
    __shared__ uint16_t near[table_size];
    int nearest = 0;  // plane whose table is in shared memory
    while (nearest < width - 1 && plan.planes[nearest].kind != coded) ++nearest;
    if (plan.planes[nearest].kind == coded)
        for (int i = threadIdx.x; i < 1 << plan.longest[nearest]; i += decoding_threads)
            near[i] = scratch.tables[nearest * table_size + i];
    __syncthreads();

    const int lane = threadIdx.x % stream_lanes;
    const int64_t b = int64_t{blockIdx.x} * decoding_blocks + threadIdx.x / stream_lanes, first = b * block_symbols;
    const bool any = b < block_count(plan.units);
    const int size = any ? static_cast<int>(symbols_of_block(plan.units, b)) : 0;
    const int other = __shfl_xor_sync(full_warp, size, 16), longer = size > other ? size : other;
    Unit* const out = static_cast<Unit*>(call.out.data) + first;
    const uint8_t* const data = call.payload + plan.data;
    bool bad = false;
    PlaneLane lanes[width];
    for (int p = 0; p < width; ++p) {
        lanes[p] = {nullptr, 0, 0, 16, 0};
        const int64_t block = plan.planes[p].first + b;
        if (any && plan.planes[p].kind == coded)
            lanes[p] = start_lane(data + scratch.offsets[block], scratch.sizes[block], lane, &bad);
    }
    for (int row = 0; row * stream_lanes < longer; row += rows) {
        const int left = size - row * stream_lanes;  // symbols, from this row on
        uint64_t units[rows] = {};
#pragma unroll 1
        for (int p = 0; p < width; ++p) {
            const StoredPlane& plane = plan.planes[p];
            const int shift = 8 * (width - 1 - p);
            if (plane.kind == coded) {
                const uint16_t* const table = p == nearest ? near : scratch.tables + p * table_size;
                PlaneLane l = lanes[p];
#pragma unroll
                for (int r = 0; r < rows; ++r)
                    units[r] |= uint64_t{decode_row(l, table, plan.longest[p], left - r * stream_lanes)} << shift;
                lanes[p] = l;
            } else {
                const uint8_t* bytes = data + (any && plane.kind == raw ? scratch.offsets[plane.first + b] : 0);
#pragma unroll
                for (int r = 0; r < rows; ++r) {
                    const int i = (row + r) * stream_lanes + lane;
                    const int byte = plane.kind != raw ? plane.value : i < size ? bytes[i] : 0;
                    units[r] |= static_cast<uint64_t>(byte) << shift;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            const int i = (row + r) * stream_lanes + lane;
            if (i >= size) continue;
            const Unit unit = static_cast<Unit>(units[r]);
            const Unit value = units_rotate(call.out.dtype) ? rotate_right(unit) : unit;
            out[i] = S::merge(S::adds ? out[i] : Unit(), call.scale, value);
        }
    }
    for (int p = 0; p < width; ++p)
        if (plan.planes[p].kind == coded)
            bad |= lanes[p].bits != 0 || lanes[p].fill != 16 || lanes[p].taken != lanes[p].count;
    if (bad) atomicOr(call.status, fault_block);
}

}  // namespace
}  // namespace cuda
}  // namespace platonic
