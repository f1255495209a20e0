// Compressing without loss: planes of bytes, each coded where that is smaller (see planes.py). Their bytes are taken
// from the tensor wherever they are needed; no symbols are kept.
#pragma once

#include "weight_compression/device_code.cuh"
#include "weight_compression/device_encode.cuh"
#include "weight_compression/device_quantize.cuh"

namespace platonic {
namespace cuda {
namespace {

constexpr double plane_sample_fraction = 0.03;

// Byte p of a unit, the most significant first, is (rotated unit) >> shift.
template <class U>
__device__ __forceinline__ uint32_t byte_of(U unit, bool rotate, int shift) {
    return static_cast<uint32_t>((rotate ? rotate_left(unit) : unit) >> shift & 255);
}
template <class U>
__device__ constexpr int shift_of(int p) {
    return 8 * (static_cast<int>(sizeof(U)) - 1 - p);
}

// The symbols of a plane.
template <class U>
struct PlaneBytes {
    const U* units;
    int shift;
    bool rotate;

    __device__ uint32_t operator[](int64_t i) const { return byte_of(units[i], rotate, shift); }
    __device__ uint4 quad(int64_t i, int64_t size) const {
        const int64_t last = size - 1;
        return make_uint4((*this)[i], (*this)[smaller(i + 1, last)], (*this)[smaller(i + 2, last)],
                          (*this)[smaller(i + 3, last)]);
    }
};

template <class U>
__device__ PlaneBytes<U> plane_of(const CompressCall& call, int p, int64_t first) {
    return {static_cast<const U*>(call.x.data) + first, shift_of<U>(p), units_rotate(call.x.dtype)};
}

// Bytes of all planes that may be coded, of the sample's units or of all; of all, whether elements differ, too. A warp
// counts into a table of its own where so many fit.
template <class U>
__global__ void __launch_bounds__(quantize_threads)
    count_planes(CompressCall call, Sample sample, bool sampled, CompressScratch scratch) {
    CompressPlan& plan = *scratch.plan;
    constexpr int width = sizeof(U), bins = 256 * width, warps = quantize_threads / 32;
    constexpr int tables = histogram_slots / bins < warps ? histogram_slots / bins : warps;
    __shared__ uint32_t histogram[tables * bins];
    for (int i = threadIdx.x; i < tables * bins; i += quantize_threads) histogram[i] = 0;
    __syncthreads();
    uint32_t* const mine = histogram + threadIdx.x / 32 % tables * bins;
    const U* const units = static_cast<const U*>(call.x.data);
    const bool rotate = units_rotate(call.x.dtype);
    const int64_t size = sampled ? sample.size : unit_count(call.x.dtype, call.x.n);
    const int64_t parts = is_complex(call.x.dtype) ? 2 : 1;
    bool counted[width], differs = false;
    for (int p = 0; p < width; ++p) counted[p] = !plan.planes[p].hopeless;
#pragma unroll 4
    for (int64_t i = first_thread(); i < size; i += all_threads()) {
        const U unit = units[sampled ? sample.place(i) : i];
        if (!sampled) differs |= unit != units[i % parts];
#pragma unroll
        for (int p = 0; p < width; ++p)
            if (counted[p]) atomicAdd(&mine[256 * p + byte_of(unit, rotate, shift_of<U>(p))], 1u);
    }
    if (__syncthreads_or(differs) != 0 && threadIdx.x == 0) atomicOr(&plan.differs, 1);
    unsigned long long* const sums = sampled ? scratch.sample : scratch.counts;
    for (int s = threadIdx.x; s < bins; s += quantize_threads) {
        unsigned long long sum = 0;
        for (int t = 0; t < tables; ++t) sum += histogram[t * bins + s];
        if (sum > 0) atomicAdd(&sums[s], sum);
    }
}

// Whether coding leaves more than 0.995 of so many bytes.
__device__ inline bool is_hopeless(int64_t coded_bits, int64_t bytes) { return 200 * coded_bits > 199 * 8 * bytes; }

// By the sample.
__global__ void __launch_bounds__(single_threads) weigh_planes(CompressCall call, CompressScratch scratch) {
    CompressPlan& plan = *scratch.plan;
    __shared__ CodeShared shared;
    for (int p = 0; p < unit_width(call.x.dtype, call.x.item); ++p) {
        const unsigned long long* const counts = scratch.sample + 256 * p;
        int64_t mine = 0;
        for (int s = threadIdx.x; s < 256; s += single_threads) mine += static_cast<int64_t>(counts[s]);
        const int64_t total = sum_over_block<single_threads>(mine);
        const int used = sort_symbols(counts, 256, false, shared.keys);
        if (used < 2) continue;
        const int64_t bits = find_lengths(scratch.code_of_plane(p), shared, 256, used);
        if (threadIdx.x == 0) plan.planes[p].hopeless = is_hopeless(bits, total);
    }
}

// How each plane is stored, and whether all together are smaller than the tensor as it is.
__global__ void __launch_bounds__(single_threads) choose_planes(CompressCall call, CompressScratch scratch) {
    CompressPlan& plan = *scratch.plan;
    if (!plan.differs) {
        if (threadIdx.x == 0) plan.mode = static_cast<int>(Mode::constant);
        return;
    }
    __shared__ CodeShared shared;
    const int64_t units = unit_count(call.x.dtype, call.x.n), blocks = block_count(units);
    const int width = unit_width(call.x.dtype, call.x.item);
    int64_t own = plane_bytes * width, stored = 0, room = 0;
    for (int p = 0; p < width; ++p) {
        const unsigned long long* const counts = scratch.counts + 256 * p;
        PlanePlan& plane = plan.planes[p];
        PlaneKind kind = PlaneKind::raw;
        int packed = 0;
        int64_t bytes = units;
        if (!plane.hopeless) {
            const int64_t bits = make_code(counts, 256, false, units, scratch.code_of_plane(p), shared, &packed);
            const int64_t coded = coded_bytes_bound(units, bits);
            if (bits < 0) {  // of a single symbol there is no code
                kind = PlaneKind::constant;
                bytes = 0;
            } else if (coded + packed < units) {
                kind = PlaneKind::coded;
                bytes = coded;
            }
        }
        if (kind != PlaneKind::coded) packed = 0;
        room += bytes;
        if (kind == PlaneKind::constant && threadIdx.x < 256 && counts[threadIdx.x] > 0)
            plane.value = static_cast<int>(threadIdx.x);
        if (threadIdx.x == 0) {
            plane.kind = static_cast<int>(kind);
            plane.length_bytes = packed;
            plane.first = stored * blocks;
        }
        own += packed;
        stored += kind != PlaneKind::constant;
    }
    if (threadIdx.x != 0) return;
    plan.blocks = stored * blocks;
    const int64_t total = data_begin(call.x.shape.dimensions, own, plan.blocks, false) + room;
    plan.mode = static_cast<int>(total < raw_bytes(call) ? Mode::planes : Mode::raw);
}

__device__ inline bool is_coded(const CompressPlan& plan, int p) {
    return plan.is(Mode::planes) && plan.planes[p].kind == static_cast<int>(PlaneKind::coded);
}

// A thread block for every block of every plane.
template <class U>
__global__ void __launch_bounds__(grid_threads) measure_planes(CompressCall call, CompressScratch scratch) {
    const int64_t units = unit_count(call.x.dtype, call.x.n), blocks = block_count(units);
    const int p = static_cast<int>(blockIdx.x / blocks);
    const int64_t b = blockIdx.x % blocks;
    const CompressPlan& plan = *scratch.plan;
    if (!is_coded(plan, p)) return;
    __shared__ uint8_t lengths[256];
    for (int s = threadIdx.x; s < 256; s += grid_threads) lengths[s] = scratch.code_of_plane(p).lengths[s];
    const uint32_t bytes = measure_block(plane_of<U>(call, p, b * block_symbols), symbols_of_block(units, b), lengths);
    if (threadIdx.x == 0) scratch.block_bytes[plan.planes[p].first + b] = bytes;
}

// As encode_coded, `each` thread blocks for every plane.
template <class U>
__global__ void __launch_bounds__(coding_threads)
    encode_planes(CompressCall call, int64_t each, CompressScratch scratch) {
    const int p = static_cast<int>(blockIdx.x / each);
    const CompressPlan& plan = *scratch.plan;
    if (!is_coded(plan, p)) return;
    constexpr uint32_t none = 256;
    __shared__ uint32_t codes[none + 1];
    for (int s = threadIdx.x; s <= 256; s += coding_threads) codes[s] = s < 256 ? scratch.code_of_plane(p).codes[s] : 0;
    __syncthreads();
    const int64_t units = unit_count(call.x.dtype, call.x.n);
    const int64_t b = blockIdx.x % each * coding_blocks + threadIdx.x / stream_lanes;
    const bool any = b < block_count(units);
    const int64_t stored = plan.planes[p].first + b;
    uint8_t* const out = call.out + plan.data + (any ? scratch.offsets[stored] : 0);
    encode_block<true>(plane_of<U>(call, p, b * block_symbols), any ? static_cast<int>(symbols_of_block(units, b)) : 0,
                       none, codes, out, any ? scratch.block_bytes[stored] : 0);
}

// Planes that are stored as they are.
template <class U>
__global__ void __launch_bounds__(grid_threads) copy_planes(CompressCall call, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    if (!plan.is(Mode::planes)) return;
    constexpr int width = sizeof(U);
    const bool rotate = units_rotate(call.x.dtype);
    uint8_t* out[width];
    for (int p = 0; p < width; ++p) {
        const bool raw = plan.planes[p].kind == static_cast<int>(PlaneKind::raw);
        out[p] = raw ? call.out + plan.data + scratch.offsets[plan.planes[p].first] : nullptr;
    }
    const U* const units = static_cast<const U*>(call.x.data);
#pragma unroll 4
    for (int64_t i = first_thread(); i < unit_count(call.x.dtype, call.x.n); i += all_threads()) {
        const U unit = units[i];
#pragma unroll
        for (int p = 0; p < width; ++p)
            if (out[p]) out[p][i] = static_cast<uint8_t>(byte_of(unit, rotate, shift_of<U>(p)));
    }
}

}  // namespace
}  // namespace cuda
}  // namespace platonic
