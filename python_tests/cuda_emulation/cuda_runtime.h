// The part of CUDA that this project's kernels use, for a C++ compiler: first on the include path, it makes a .cu file
// whose kernels are started with launch() of common/cuda_utils.cuh run on the CPU, one block after the other, a fiber
// per thread. See emulation.h for what is checked on the way.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))
#define PLATONIC_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(emulation::dynamic_shared())

struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using emulation::blockDim;
using emulation::blockIdx;
using emulation::dim3;
using emulation::gridDim;
using emulation::threadIdx;
using std::isfinite;

// ---- the runtime ----

enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef void* cudaStream_t;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline const char* cudaGetErrorName(cudaError_t) { return "error"; }
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
    memset(to, value, size);
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
    emulation::run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                   [&] { std::apply(kernel, parameters); });
    return cudaSuccess;
}

// ---- what kernels call ----

inline void __syncthreads() { emulation::barrier(false); }
inline int __syncthreads_or(int x) { return emulation::barrier(x != 0); }
inline int __syncthreads_and(int x) { return !emulation::barrier(x == 0); }
inline void __threadfence() {}  // blocks run one after the other
template <class T>
T __ldcg(const T* at) {
    return *at;
}

inline void __syncwarp(uint32_t mask = 0xffffffffu) { emulation::exchange(emulation::Collective::sync, mask, 0, 0); }
inline uint32_t __ballot_sync(uint32_t mask, int x) {
    return static_cast<uint32_t>(emulation::exchange(emulation::Collective::ballot, mask, x != 0, 0));
}
template <class T>
T emulated_exchange(emulation::Collective kind, uint32_t mask, T value, int argument) {
    static_assert(sizeof(T) <= 8, "warps exchange up to eight bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = emulation::exchange(kind, mask, bits, argument);
    memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
    return emulated_exchange(emulation::Collective::shuffle_xor, mask, value, lanes);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int lanes) {
    return emulated_exchange(emulation::Collective::shuffle_up, mask, value, lanes);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int lanes) {
    return emulated_exchange(emulation::Collective::shuffle_down, mask, value, lanes);
}
inline uint32_t __match_any_sync(uint32_t mask, int value) {
    return static_cast<uint32_t>(
        emulation::exchange(emulation::Collective::match, mask, static_cast<uint32_t>(value), 0));
}

// Fibers change places only where they wait: nothing comes between a load and its store.
template <class T, class U>
T atomicAdd(T* at, U value) {
    const T old = *at;
    *at = old + static_cast<T>(value);
    return old;
}
template <class T, class U>
T atomicMax(T* at, U value) {
    const T old = *at;
    if (static_cast<T>(value) > old) *at = static_cast<T>(value);
    return old;
}
template <class T, class U>
T atomicOr(T* at, U value) {
    const T old = *at;
    *at = old | static_cast<T>(value);
    return old;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
