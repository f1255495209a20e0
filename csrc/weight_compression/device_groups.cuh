// Compressing with ranges of groups: finding them, and storing them in the header.
#pragma once

#include "weight_compression/device_quantize.cuh"

namespace platonic {
namespace cuda {
namespace {

constexpr int64_t slice_values = 4096;  // of a group that a warp looks at

template <class T>
__global__ void __launch_bounds__(grid_threads) find_group_ranges(CompressCall call, CompressScratch scratch) {
    if (!scratch.plan->quantised) return;
    typedef typename T::Real R;
    typedef typename KeyOf<R>::type Key;
    const auto* x = static_cast<const typename T::Bits*>(call.x.data);
    auto* const groups = static_cast<GroupKeys<R>*>(scratch.group_keys);
    const int64_t n = call.x.n, size = call.group_size, slices = size / slice_values + (size % slice_values != 0);
    const int64_t all = group_count(n, size) * slices;
    const int lane = threadIdx.x % 32;
    for (int64_t s = first_thread() / 32; s < all; s += all_threads() / 32) {
        const int64_t group = s / slices, begin = group * size + s % slices * slice_values;
        const int64_t end = smaller(smaller(begin + slice_values, (group + 1) * size), n);
        RunningExtent<T> running;
#pragma unroll 4
        for (int64_t i = begin + lane; i < end; i += 32) running.take(T::widen(x[i]));
        const bool any = begin + lane < end;
        GroupKeys<R> keys{any ? static_cast<Key>(~key_of(running.lo)) : Key(0), any ? key_of(running.hi) : Key(0)};
        for (int apart = 16; apart > 0; apart /= 2) {
            const Key not_lo = __shfl_xor_sync(full_warp, keys.not_lo, apart);
            const Key hi = __shfl_xor_sync(full_warp, keys.hi, apart);
            keys.not_lo = not_lo > keys.not_lo ? not_lo : keys.not_lo;
            keys.hi = hi > keys.hi ? hi : keys.hi;
        }
        if (lane != 0 || begin >= end) continue;
        atomicMax(&groups[group].not_lo, keys.not_lo);
        atomicMax(&groups[group].hi, keys.hi);
    }
}

// The widest of them, and whether any has a width.
template <class T>
__global__ void __launch_bounds__(grid_threads) survey_groups(CompressCall call, CompressScratch scratch) {
    CompressPlan& plan = *scratch.plan;
    if (!plan.quantised) return;
    typedef typename T::Real R;
    const auto* groups = static_cast<const GroupKeys<R>*>(scratch.group_keys);
    double widest = 0;
    bool wide = false;
    for (int64_t g = first_thread(); g < group_count(call.x.n, call.group_size); g += all_threads()) {
        const R lo = lo_of(groups[g]), hi = hi_of(groups[g]);
        const double half = static_cast<double>(hi) / 2.0 - static_cast<double>(lo) / 2.0;
        widest = half > widest ? half : widest;
        wide |= lo < hi;
    }
    for (int apart = 16; apart > 0; apart /= 2) {
        const double other = __shfl_xor_sync(full_warp, widest, apart);
        widest = other > widest ? other : widest;
    }
    wide = __ballot_sync(full_warp, wide) != 0;
    if (threadIdx.x % 32 != 0) return;
    unsigned long long bits;
    memcpy(&bits, &widest, sizeof bits);  // integers that ascend with numbers that are not negative
    atomicMax(&plan.widest, bits);
    if (wide) atomicOr(&plan.wide, 1);
}

template <class T>
__global__ void __launch_bounds__(grid_threads) encode_ranges(CompressCall call, CompressScratch scratch) {
    const CompressPlan& plan = *scratch.plan;
    if (!plan.is(Mode::fixed) && !plan.is(Mode::entropy)) return;
    const auto* groups = static_cast<const GroupKeys<typename T::Real>*>(scratch.group_keys);
    constexpr int64_t item = sizeof(typename T::Bits);
    const int64_t count = group_count(call.x.n, call.group_size);
    uint8_t* const out = call.out + plan.table - 2 * item * count;  // they end where the table begins
    for (int64_t g = first_thread(); g < count; g += all_threads()) {
        put(out + 2 * item * g, T::narrow(lo_of(groups[g])));
        put(out + 2 * item * g + item, T::narrow(hi_of(groups[g])));
    }
}

}  // namespace
}  // namespace cuda
}  // namespace platonic
