// Compressing with clip_quantile: the range of the sample without its outermost values, and what lies beyond it.
//
// The two values at the ends of that range are found digit by digit, from the top, of the integers that ascend with
// values: of all that begin with the digits known so far, one pass counts the next ones, and a block picks the one
// where the rank lies. 12 bits a digit: three passes over the sample of all dtypes but float64, which takes six.
#pragma once

#include "weight_compression/device_quantize.cuh"

namespace platonic {
namespace cuda {
namespace {

constexpr int digit_bits = 12;
static_assert(1 << digit_bits == max_coded_levels, "as many counters as a digit has values");

template <class R>
constexpr int digit_passes = (8 * static_cast<int>(sizeof(R)) + digit_bits - 1) / digit_bits;

// The digit of a pass: `width` bits, `shift` from the bottom.
template <class R>
struct Digit {
    int shift, width;

    explicit __device__ Digit(int pass) {
        const int left = 8 * static_cast<int>(sizeof(R)) - digit_bits * pass;
        width = left < digit_bits ? left : digit_bits;
        shift = left - width;
    }
};

template <class T>
__global__ void __launch_bounds__(grid_threads)
    count_digits(CompressCall call, Sample sample, int pass, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    if (!plan.quantised) return;
    typedef typename T::Real R;
    __shared__ uint32_t counts[2][1 << digit_bits];
    for (int i = threadIdx.x; i < 2 << digit_bits; i += grid_threads)
        counts[i >> digit_bits][i % (1 << digit_bits)] = 0;
    __syncthreads();
    const Digit<R> digit(pass);
    const auto* x = static_cast<const typename T::Bits*>(call.x.data);
#pragma unroll 4
    for (int64_t i = first_thread(); i < sample.size; i += all_threads()) {
        const auto key = key_of(T::widen(x[sample.place(i)]));
        const int value = static_cast<int>(key >> digit.shift & ((1u << digit.width) - 1));
        for (int e = 0; e < 2; ++e)
            if (pass == 0 || key >> (digit.shift + digit.width) == plan.ends[e]) atomicAdd(&counts[e][value], 1u);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 1 << digit_bits; i += grid_threads) {
        if (counts[0][i] > 0) atomicAdd(&scratch.sample[i], static_cast<unsigned long long>(counts[0][i]));
        if (counts[1][i] > 0) atomicAdd(&scratch.counts[i], static_cast<unsigned long long>(counts[1][i]));
    }
}

// Adds the digit of a pass to both ends; after the last, they are the range, if it has a width.
template <class T>
__global__ void __launch_bounds__(single_threads) pick_digits(int pass, CompressScratch scratch) {
    CompressPlan& plan = *scratch.plan;
    if (!plan.quantised) return;
    typedef typename T::Real R;
    constexpr int each = (1 << digit_bits) / single_threads;
    const Digit<R> digit(pass);
    for (int e = 0; e < 2; ++e) {
        unsigned long long* const counts = (e == 0 ? scratch.sample : scratch.counts) + each * threadIdx.x;
        int64_t mine = 0, total;
        for (int k = 0; k < each; ++k) mine += static_cast<int64_t>(counts[k]);
        const int64_t rank = plan.ranks[e], before = exclusive_sum<single_threads>(mine, &total);
        __syncthreads();  // all have read the rank
        int64_t rest = rank - before;
        for (int k = 0; k < each; ++k) {
            const int64_t count = static_cast<int64_t>(counts[k]);
            counts[k] = 0;
            if (rest >= 0 && rest < count) {
                plan.ends[e] = plan.ends[e] << digit.width | (each * threadIdx.x + k);
                plan.ranks[e] = rest;
            }
            rest -= count;
        }
    }
    __syncthreads();
    if (threadIdx.x != 0 || digit.shift > 0) return;
    typedef typename KeyOf<R>::type Key;
    const R lo = value_of_key<R>(static_cast<Key>(plan.ends[0])), hi = value_of_key<R>(static_cast<Key>(plan.ends[1]));
    plan.clamped = lo < hi;
    if (!plan.clamped) return;
    plan.lo = static_cast<double>(lo);
    plan.hi = static_cast<double>(hi);
}

template <class T>
__device__ bool lies_outside(const CompressPlan& plan, typename T::Real w) {
    typedef typename T::Real R;
    return w < static_cast<R>(plan.lo) || w > static_cast<R>(plan.hi);
}

// Of every payload block, by a thread block.
template <class T>
__global__ void __launch_bounds__(grid_threads) count_outside(CompressCall call, CompressScratch scratch) {
    CompressPlan& plan = *scratch.plan;
    if (!plan.quantised || !plan.clamped) return;
    const int64_t first = blockIdx.x * block_symbols, size = symbols_of_block(call.x.n, blockIdx.x);
    const auto* x = static_cast<const typename T::Bits*>(call.x.data) + first;
    int64_t mine = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < size; i += grid_threads) mine += lies_outside<T>(plan, T::widen(x[i]));
    const int64_t count = sum_over_block<grid_threads>(mine);
    if (threadIdx.x != 0) return;
    scratch.escapes[blockIdx.x] = static_cast<uint32_t>(count);
    if (count > 0) atomicAdd(&plan.escapes, static_cast<unsigned long long>(count));
}

// Where what is kept exactly takes more than it saves, everything once more without; else nothing more is to be done.
__global__ void __launch_bounds__(single_threads) unclip(CompressScratch scratch) {
    CompressPlan& plan = *scratch.plan;
    for (int i = threadIdx.x; i < max_coded_levels; i += single_threads)
        scratch.sample[i] = scratch.counts[i] = scratch.sampled[i] = 0;
    if (threadIdx.x != 0) return;
    if (!plan.quantised || !plan.clamped || !plan.is(Mode::raw)) {
        plan.quantised = 0;
        return;
    }
    plan.clamped = 0;
    plan.escapes = 0;
    plan.again = 0;
    plan.lo = plan.whole_lo;
    plan.hi = plan.whole_hi;
}

// The positions behind a block's symbols, then the values.
template <class T>
__global__ void __launch_bounds__(grid_threads) encode_escapes(CompressCall call, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    const int64_t b = blockIdx.x;
    if (!plan.has_escapes() || scratch.escapes[b] == 0) return;
    typedef typename T::Bits Bits;
    const int64_t first = b * block_symbols, size = symbols_of_block(call.x.n, b), count = scratch.escapes[b];
    const Bits* const x = static_cast<const Bits*>(call.x.data) + first;
    uint8_t* const positions = call.out + plan.data + scratch.offsets[b] + scratch.block_bytes[b];
    int64_t found = 0;
    for (int64_t begin = 0; begin < size; begin += grid_threads) {
        const int64_t i = begin + threadIdx.x;
        const Bits value = i < size ? x[i] : Bits();
        const bool outside = i < size && lies_outside<T>(plan, T::widen(value));
        int64_t total;
        const int64_t k = found + exclusive_sum<grid_threads>(outside, &total);
        if (outside && k < count) {  // more only where the tensor is being changed meanwhile
            put(positions + 2 * k, static_cast<uint16_t>(i));
            put(positions + 2 * count + int64_t{sizeof(Bits)} * k, value);
        }
        found += total;
    }
}

}  // namespace
}  // namespace cuda
}  // namespace platonic
