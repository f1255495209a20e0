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

// After every kernel launch: PLATONIC_CHECK_LAUNCH("gram: partial sums").
#define PLATONIC_CHECK_LAUNCH(what) ::platonic::check_cuda(cudaGetLastError(), what)

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

// kernel(arguments...) on `grid` blocks of `threads` threads. A function of the runtime instead of <<<>>>, which a
// C++ compiler can read too: python_tests/cuda_emulation runs kernels launched this way on the CPU.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t grid, int threads, const Launch& on,
            const Arguments&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_of(on);
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

inline int multiprocessors(int device) {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
    return count;
}

}  // namespace platonic
