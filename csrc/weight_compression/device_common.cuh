// What the codec's kernels share: values of any dtype, sums over a thread block, bytes at any address.
#pragma once

#include "common/cuda_utils.cuh"
#include "common/half.h"
#include "weight_compression/payload_layout.h"
#include "weight_compression/quantizer.h"
#include "weight_compression/source.h"

namespace platonic {
namespace cuda {
namespace {

constexpr uint32_t full_warp = 0xffffffffu;

__device__ __forceinline__ int64_t first_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t all_threads() { return int64_t{gridDim.x} * blockDim.x; }
__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ __forceinline__ int64_t symbols_of_block(int64_t n, int64_t block) {
    return smaller(block_symbols, n - block * block_symbols);
}

// ---- values: stored as T::Bits, computed with as T::Real ----

struct Float32 {
    typedef float Bits;
    typedef float Real;
    static __device__ __forceinline__ float widen(float x) { return x; }
    static __device__ __forceinline__ float narrow(float x) { return x; }
};
struct Float64 {
    typedef double Bits;
    typedef double Real;
    static __device__ __forceinline__ double widen(double x) { return x; }
    static __device__ __forceinline__ double narrow(double x) { return x; }
};
struct Float16 {
    typedef uint16_t Bits;
    typedef float Real;
    static __device__ __forceinline__ float widen(uint16_t x) { return half_to_float(x); }
    static __device__ __forceinline__ uint16_t narrow(float x) { return float_to_half(x); }
};
struct Bfloat16 {
    typedef uint16_t Bits;
    typedef float Real;
    static __device__ __forceinline__ float widen(uint16_t x) { return bfloat_to_float(x); }
    static __device__ __forceinline__ uint16_t narrow(float x) { return float_to_bfloat(x); }
};

// Calls run(T()) for the struct above that `dtype` stands for.
template <class F>
void with_dtype(int dtype, const F& run) {
    switch (static_cast<DType>(dtype)) {
        case DType::float32:
            return run(Float32());
        case DType::float64:
            return run(Float64());
        case DType::float16:
            return run(Float16());
        case DType::bfloat16:
            return run(Bfloat16());
    }
    throw std::invalid_argument("the codec quantises float32, float64, float16 and bfloat16, got dtype " +
                                std::to_string(dtype));
}

// ---- units of planes of bytes ----

template <int width>
struct UnsignedOf;
template <>
struct UnsignedOf<1> {
    typedef uint8_t type;
};
template <>
struct UnsignedOf<2> {
    typedef uint16_t type;
};
template <>
struct UnsignedOf<4> {
    typedef uint32_t type;
};
template <>
struct UnsignedOf<8> {
    typedef uint64_t type;
};

// Calls run(U()) for the unsigned integer U of so many bytes.
template <class F>
void with_unit(int width, const F& run) {
    if (width == 1) return run(uint8_t());
    if (width == 2) return run(uint16_t());
    if (width == 4) return run(uint32_t());
    run(uint64_t());
}

template <class U>
__device__ __forceinline__ U rotate_left(U u) {
    return static_cast<U>(u << 1 | u >> (8 * sizeof(U) - 1));
}
template <class U>
__device__ __forceinline__ U rotate_right(U u) {
    return static_cast<U>(u >> 1 | u << (8 * sizeof(U) - 1));
}

// ---- runs of values, sums of them ----

// Four values that follow each other, one load or two where they are aligned.
template <class Bits>
struct alignas(sizeof(Bits) < 4 ? 4 * sizeof(Bits) : 16) Quad {
    Bits of[4];
};

template <class Bits>
__device__ __forceinline__ bool quads_aligned(const Bits* x) {
    return reinterpret_cast<uintptr_t>(x) % alignof(Quad<Bits>) == 0;
}

// x[i], ..., x[i + 3]; beyond n, x[n - 1].
template <class Bits>
__device__ __forceinline__ Quad<Bits> load_quad(const Bits* x, int64_t i, int64_t n, bool aligned) {
    if (aligned && i + 4 <= n) return *reinterpret_cast<const Quad<Bits>*>(x + i);
    Quad<Bits> quad;
    for (int k = 0; k < 4; ++k) quad.of[k] = x[smaller(i + k, n - 1)];
    return quad;
}

// out = value, or out + scale * value, where value is rounded to the dtype first.
template <class T>
__device__ __forceinline__ typename T::Bits combine(bool accumulate, typename T::Bits old, double scale,
                                                    typename T::Bits value) {
    if (!accumulate) return value;
    return T::narrow(T::widen(old) + static_cast<typename T::Real>(scale) * T::widen(value));
}

// The range of a group, as payloads store it.
template <class T>
struct StoredRange {
    typename T::Real lo, hi;
};
template <class T>
__device__ StoredRange<T> stored_range(const uint8_t* ranges, int64_t group) {
    constexpr int64_t item = sizeof(typename T::Bits);
    const uint8_t* const both = ranges + 2 * item * group;
    return {T::widen(get<typename T::Bits>(both)), T::widen(get<typename T::Bits>(both + item))};
}

// ---- over the threads of a block; all of them call ----

// The sum of the values of the threads before this one; `total` is that of all.
template <int threads>
__device__ int64_t exclusive_sum(int64_t value, int64_t* total) {
    static_assert(threads % 32 == 0 && threads <= 1024, "whole warps, of which one adds up the others' sums");
    __shared__ int64_t sums[threads / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t inclusive = value;
    for (int apart = 1; apart < 32; apart *= 2) {
        const int64_t other = __shfl_up_sync(full_warp, inclusive, apart);
        if (lane >= apart) inclusive += other;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = inclusive;
    __syncthreads();
    int64_t before = 0;
    *total = 0;
    for (int w = 0; w < threads / 32; ++w) {
        if (w < warp) before += sums[w];
        *total += sums[w];
    }
    return before + inclusive - value;
}

template <int threads>
__device__ int64_t sum_over_block(int64_t value) {
    int64_t total;
    exclusive_sum<threads>(value, &total);
    return total;
}

// ---- bytes ----

// The four bytes from p on, of which those outside of [begin, end) are 0. Where all words around them lie inside of
// the memory, two aligned loads.
__device__ __forceinline__ uint32_t load_word(const uint8_t* p, const uint8_t* begin, const uint8_t* end) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    const uint32_t off = address % 4;
    const uint8_t* low = p - off;
    if (low >= begin && low + 8 <= end) {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(low);
        return off == 0 ? words[0] : __funnelshift_r(words[0], words[1], 8 * off);
    }
    uint32_t word = 0;
    for (int b = 0; b < 4; ++b)
        if (p + b >= begin && p + b < end) word |= static_cast<uint32_t>(p[b]) << (8 * b);
    return word;
}

// `size` bytes from anywhere to anywhere, by all threads of the grid.
__device__ inline void copy_bytes(const uint8_t* from, uint8_t* to, int64_t size) {
    const int64_t head = smaller(static_cast<int64_t>((4 - reinterpret_cast<uintptr_t>(to) % 4) % 4), size);
    const int64_t words = (size - head) / 4, tail = head + 4 * words;
    uint32_t* whole = reinterpret_cast<uint32_t*>(to + head);
#pragma unroll 4
    for (int64_t i = first_thread(); i < words; i += all_threads())
        whole[i] = load_word(from + head + 4 * i, from, from + size);
    if (first_thread() == 0) {
        for (int64_t i = 0; i < head; ++i) to[i] = from[i];
        for (int64_t i = tail; i < size; ++i) to[i] = from[i];
    }
}

// ---- memory from one pointer ----

class Arena {
public:
    explicit Arena(void* begin) : at_(reinterpret_cast<uintptr_t>(begin)) {}
    template <class T>
    T* take(int64_t count) {
        const uintptr_t place = at_;
        at_ += (static_cast<uintptr_t>(count) * sizeof(T) + 255) / 256 * 256;
        return reinterpret_cast<T*>(place);
    }
    int64_t used() const { return static_cast<int64_t>(at_); }  // of an arena that begins at null

private:
    uintptr_t at_;
};

}  // namespace
}  // namespace cuda
}  // namespace platonic
