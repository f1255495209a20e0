// Compressing, first half: from values to symbols and their numbers. The tensor is read twice, once for its range and
// once to be quantised; between them lies a sample, 3 % of it, that the number of levels is estimated from. Symbols are
// kept, one or two bytes each, so that what follows reads a quarter of the values' bytes.
#pragma once

#include "weight_compression/device_ratio.cuh"
#include "weight_compression/device_symbols.cuh"

namespace platonic {
namespace cuda {
namespace {

// ---- range ----

constexpr int quads_at_once = 4;  // loads in flight of a thread

template <class T>
struct RunningExtent {
    typedef typename T::Real R;
    R lo, hi;
    bool finite;

    __device__ RunningExtent() : lo(static_cast<R>(INFINITY)), hi(static_cast<R>(-INFINITY)), finite(true) {}
    __device__ void take(R w) {
        finite = finite && w - w == R(0);
        lo = w < lo ? w : lo;
        hi = w > hi ? w : hi;
    }
};

// Minima are exact in any order; which zero comes out of one is not, and is settled at the end.
template <int threads>
__device__ Extent extent_of_block(Extent mine) {
    __shared__ Extent parts[threads / 32];
    for (int apart = 16; apart > 0; apart /= 2) {
        const double lo = __shfl_xor_sync(full_warp, mine.lo, apart), hi = __shfl_xor_sync(full_warp, mine.hi, apart);
        mine.finite &= __shfl_xor_sync(full_warp, mine.finite, apart);
        mine.lo = lo < mine.lo ? lo : mine.lo;
        mine.hi = hi > mine.hi ? hi : mine.hi;
    }
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
    __syncthreads();
    for (int w = 0; w < threads / 32; ++w) {
        mine.lo = parts[w].lo < mine.lo ? parts[w].lo : mine.lo;
        mine.hi = parts[w].hi > mine.hi ? parts[w].hi : mine.hi;
        mine.finite &= parts[w].finite;
    }
    return mine;
}

template <class T>
__global__ void __launch_bounds__(grid_threads)
    find_extents(const typename T::Bits* x, int64_t n, CompressScratch scratch) {
    constexpr int64_t tile = 4 * quads_at_once * grid_threads;
    const bool aligned = quads_aligned(x);
    RunningExtent<T> running;
    for (int64_t begin = blockIdx.x * tile; begin < n; begin += gridDim.x * tile) {
        Quad<typename T::Bits> quads[quads_at_once];
#pragma unroll
        for (int q = 0; q < quads_at_once; ++q) {
            const int64_t i = begin + 4 * (q * grid_threads + int64_t{threadIdx.x});
            quads[q] = load_quad(x, smaller(i, n - 1), n, aligned && i < n);
        }
#pragma unroll
        for (int q = 0; q < quads_at_once; ++q)
            for (int k = 0; k < 4; ++k) running.take(T::widen(quads[q].of[k]));
    }
    const Extent mine{static_cast<double>(running.lo), static_cast<double>(running.hi), running.finite};
    const Extent extent = extent_of_block<grid_threads>(mine);
    if (threadIdx.x == 0) scratch.extents[blockIdx.x] = extent;
}

// The tensor's range, and whether it decides the mode. `sample` is the number of the sample's values.
template <class T>
__global__ void __launch_bounds__(grid_threads)
    settle_range(CompressCall call, int parts, int64_t sample, CompressScratch scratch) {
    Extent mine{INFINITY, -INFINITY, 1};
    for (int i = threadIdx.x; i < parts; i += grid_threads) {
        const Extent part = scratch.extents[i];
        mine.lo = part.lo < mine.lo ? part.lo : mine.lo;
        mine.hi = part.hi > mine.hi ? part.hi : mine.hi;
        mine.finite &= part.finite;
    }
    const Extent extent = extent_of_block<grid_threads>(mine);
    if (threadIdx.x != 0) return;
    CompressPlan& plan = *scratch.plan;
    plan.lo = plan.whole_lo = extent.lo + 0.0;  // -0 becomes 0
    plan.hi = plan.whole_hi = extent.hi + 0.0;
    plan.ranks[0] = call.cut;
    plan.ranks[1] = sample - 1 - call.cut;
    plan.refused = !extent.finite && !call.keep_nonfinite;
    plan.mode = static_cast<int>(Mode::raw);
    if (call.x.n == 1 || (extent.finite && plan.lo == plan.hi)) {
        plan.mode = static_cast<int>(Mode::constant);
    } else if (extent.finite) {
        plan.quantised = 1;
    }
}

// ---- the number of levels ----

// In the bins of the entropy, or, once they are known, in all levels.
template <class T>
__global__ void __launch_bounds__(grid_threads)
    count_sample(CompressCall call, Sample sample, bool in_levels, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    if (!plan.quantised || (in_levels && plan.levels > max_coded_levels)) return;
    static_assert(max_coded_levels >= 1 << 12, "as many counters as the entropy may have bins");
    __shared__ uint32_t counts[max_coded_levels];
    unsigned long long* const sums = in_levels ? scratch.sampled : scratch.sample;
    const int bins = in_levels ? static_cast<int>(plan.levels) : 1 << call.entropy_bits;
    for (int i = threadIdx.x; i < bins; i += grid_threads) counts[i] = 0;
    __syncthreads();
    const auto* x = static_cast<const typename T::Bits*>(call.x.data);
    SymbolMaker<T> symbol_at(call, scratch, bins);
#pragma unroll 4
    for (int64_t i = first_thread(); i < sample.size; i += all_threads()) {
        const int64_t place = sample.place(i);
        atomicAdd(&counts[symbol_at(place, T::widen(x[place]))], 1u);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < bins; i += grid_threads)
        if (counts[i] > 0) atomicAdd(&sums[i], static_cast<unsigned long long>(counts[i]));
}

// Half of the widest range that the levels divide.
__device__ inline double half_width(const CompressCall& call, const CompressPlan& plan) {
    if (call.group_size == 0) return plan.hi / 2.0 - plan.lo / 2.0;
    double widest;
    memcpy(&widest, &plan.widest, sizeof widest);
    return widest;
}

// Levels by the rule, or 0 if none are enough; the first of a search.
__device__ inline int64_t levels_by_rule(const CompressCall& call, CompressPlan& plan) {
    if (call.group_size > 0 && !plan.wide) return 2;  // groups without width: every number of levels is exact
    switch (call.rule) {
        case LevelRule::entropy:
            return levels_of_bits(plan.entropy + call.value);
        case LevelRule::given:
            return static_cast<int64_t>(call.value);
        case LevelRule::max_error:
            return levels_of_error(half_width(call, plan), call.value);
        case LevelRule::ratio:
            break;
    }
    const int64_t item = call.x.item;
    return first_levels(
        call, plan,
        static_cast<int64_t>(plan.escapes) * (2 + item) + 2 * item * group_count(call.x.n, call.group_size));
}

__global__ void __launch_bounds__(single_threads) choose_levels(CompressCall call, CompressScratch scratch) {
    CompressPlan& plan = *scratch.plan;
    if (!plan.quantised) return;
    __shared__ double terms[1 << 12];
    const int bins = 1 << call.entropy_bits;
    int64_t mine = 0;
    for (int i = threadIdx.x; i < bins; i += single_threads) {
        const int64_t count = static_cast<int64_t>(scratch.sample[i]);
        terms[i] = entropy_term(count);
        mine += count;
    }
    const int64_t total = sum_over_block<single_threads>(mine);  // all terms are there after it
    if (threadIdx.x != 0) return;
    double sum = 0.0;
    for (int i = 0; i < bins; ++i) sum = sum + terms[i];
    plan.entropy = entropy_of_terms(sum, total);
    plan.levels = levels_by_rule(call, plan);
    if (plan.levels == 0) {
        plan.quantised = 0;
        return;
    }
    plan.bits = fixed_bits(plan.levels);
}

// ---- symbols ----

constexpr int quantize_threads = 512;
constexpr int histogram_slots = 8192;

// Counts only where symbols may be coded. A warp counts into a table of its own where so many fit, which spreads the
// additions of frequent symbols; additions of integers give the same sums in any order. Without `keep` it counts the
// symbols of a try in a search of levels, and stores none.
template <class T, bool keep>
__global__ void __launch_bounds__(quantize_threads) quantize_values(CompressCall call, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    if (!plan.quantised || (!keep && !plan.search.searching)) return;
    typedef typename T::Bits Bits;
    __shared__ uint32_t histogram[histogram_slots];
    const int64_t levels = plan.levels, n = call.x.n;
    const bool count = levels <= max_coded_levels, wide = levels > 256;
    const int tables = count ? static_cast<int>(smaller(quantize_threads / 32, histogram_slots / levels)) : 0;
    for (int i = threadIdx.x; i < tables * levels; i += quantize_threads) histogram[i] = 0;
    __syncthreads();
    uint32_t* mine = histogram + (count ? threadIdx.x / 32 % tables * levels : 0);
    const Bits* x = static_cast<const Bits*>(call.x.data);
    const bool aligned = quads_aligned(x);
    SymbolMaker<T> symbol_at(call, scratch, levels);
    constexpr int64_t tile = 4 * quads_at_once * quantize_threads;
    for (int64_t begin = blockIdx.x * tile; begin < n; begin += gridDim.x * tile) {
        Quad<Bits> quads[quads_at_once];
#pragma unroll
        for (int q = 0; q < quads_at_once; ++q) {
            const int64_t i = begin + 4 * (q * quantize_threads + int64_t{threadIdx.x});
            if (i < n) quads[q] = load_quad(x, i, n, aligned);
        }
#pragma unroll
        for (int q = 0; q < quads_at_once; ++q) {
            const int64_t i = begin + 4 * (q * quantize_threads + int64_t{threadIdx.x});
            if (i >= n) break;
            uint32_t s[4] = {0, 0, 0, 0};
            for (int k = 0; k < 4 && i + k < n; ++k) {
                s[k] = symbol_at(i + k, T::widen(quads[q].of[k]));
                if (count) atomicAdd(&mine[s[k]], 1u);
            }
            if (!keep) continue;
            if (wide)
                *reinterpret_cast<uint2*>(static_cast<uint16_t*>(scratch.symbols) + i) =
                    make_uint2(s[0] | s[1] << 16, s[2] | s[3] << 16);
            else
                *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(scratch.symbols) + i) =
                    s[0] | s[1] << 8 | s[2] << 16 | s[3] << 24;
        }
    }
    __syncthreads();
    for (int s = threadIdx.x; count && s < levels; s += quantize_threads) {
        unsigned long long sum = 0;
        for (int t = 0; t < tables; ++t) sum += histogram[t * levels + s];
        if (sum > 0) atomicAdd(&scratch.counts[s], sum);
    }
}

}  // namespace
}  // namespace cuda
}  // namespace platonic
