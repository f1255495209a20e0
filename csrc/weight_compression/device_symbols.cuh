// Compressing: how a value becomes a symbol, by the range of all values or by that of its group.
//
// The range of a group is found by many threads, as the largest of two integers: that of hi, and the complement of that
// of lo, which ascend with the values. Zero is below both.
#pragma once

#include "weight_compression/device_plan.cuh"

namespace platonic {
namespace cuda {
namespace {

template <class R>
struct KeyOf;
template <>
struct KeyOf<float> {
    typedef uint32_t type;
    static constexpr uint32_t sign = 0x80000000u;
};
template <>
struct KeyOf<double> {
    typedef unsigned long long type;
    static constexpr unsigned long long sign = 0x8000000000000000ull;
};

template <class R>
__device__ __forceinline__ typename KeyOf<R>::type key_of(R x) {
    typename KeyOf<R>::type bits;
    memcpy(&bits, &x, sizeof x);
    return bits & KeyOf<R>::sign ? ~bits : bits | KeyOf<R>::sign;
}

// -0 becomes 0: which of them comes first must not show.
template <class R>
__device__ __forceinline__ R value_of_key(typename KeyOf<R>::type key) {
    const typename KeyOf<R>::type bits = key & KeyOf<R>::sign ? key ^ KeyOf<R>::sign : ~key;
    R x;
    memcpy(&x, &bits, sizeof x);
    return x + R(0);
}

template <class R>
struct GroupKeys {
    typename KeyOf<R>::type not_lo, hi;
};

template <class R>
__device__ __forceinline__ R lo_of(const GroupKeys<R>& keys) {
    return value_of_key<R>(static_cast<typename KeyOf<R>::type>(~keys.not_lo));
}
template <class R>
__device__ __forceinline__ R hi_of(const GroupKeys<R>& keys) {
    return value_of_key<R>(keys.hi);
}

// Of values whose indices ascend. What lies beyond a range gets the outermost symbols; only clipping leaves any there.
template <class T>
class SymbolMaker {
public:
    typedef typename T::Real R;

    __device__ SymbolMaker(const CompressCall& call, const CompressScratch& scratch, int64_t levels)
        : groups_(static_cast<const GroupKeys<R>*>(scratch.group_keys)),
          group_size_(call.group_size),
          levels_(levels),
          end_(call.group_size > 0 ? 0 : INT64_MAX),
          lo_(0),
          hi_(0),
          z_{} {
        if (group_size_ == 0) enter(static_cast<R>(scratch.plan->lo), static_cast<R>(scratch.plan->hi));
    }
    __device__ __forceinline__ uint32_t operator()(int64_t i, R w) {
        if (i >= end_) {
            const int64_t group = i / group_size_;
            end_ = (group + 1) * group_size_;
            enter(lo_of(groups_[group]), hi_of(groups_[group]));
        }
        w = w < lo_ ? lo_ : w;
        w = w > hi_ ? hi_ : w;
        return symbol_of(z_, static_cast<uint32_t>(levels_ - 1), w);
    }

private:
    const GroupKeys<R>* groups_;
    int64_t group_size_, levels_, end_;
    R lo_, hi_;
    Quantizer<R> z_;

    // All values of a group without width have symbol 0.
    __device__ void enter(R lo, R hi) {
        lo_ = lo;
        hi_ = hi;
        z_ = lo < hi ? make_quantizer<R>(static_cast<double>(lo), static_cast<double>(hi), levels_)
                     : Quantizer<R>{1, lo, 0};
    }
};

}  // namespace
}  // namespace cuda
}  // namespace platonic
