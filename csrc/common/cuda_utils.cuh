// What every .cu file needs: the device for the length of a call, and launch errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/launch.h"

namespace platonic {

inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ": " +
                                 cudaGetErrorString(status));
}

// Makes `device` current and puts the caller's device back.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
        if (device != previous_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() { cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int previous_ = 0;
};

inline cudaStream_t stream_of(const Launch& on) { return static_cast<cudaStream_t>(on.stream); }

// In a kernel: an array in the shared memory that its launch asked for.
#ifndef PLATONIC_DYNAMIC_SHARED
#define PLATONIC_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

struct Grid {
    dim3 blocks, threads;
    int64_t shared_bytes = 0;  // of a block, beside what the kernel declares
};

// kernel(arguments...) on `grid`. A function of the runtime instead of <<<>>>, which a C++ compiler can read too:
// python_tests/cuda_emulation runs kernels launched this way on the CPU.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), const Grid& grid, const Launch& on,
            const Arguments&... arguments) {
    if (grid.shared_bytes > 48 * 1024)  // more than every device grants unasked
        check_cuda(
            cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(grid.shared_bytes)),
            what);
    cudaLaunchConfig_t config = {};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config.stream = stream_of(on);
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, int threads, const Launch& on,
            const Arguments&... arguments) {
    const Grid grid{dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads))};
    launch(what, kernel, grid, on, arguments...);
}

inline int multiprocessors(int device) {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
    return count;
}

}  // namespace platonic
