// Where a kernel runs, and what every kernel needs to say about failure.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

// Marks inline functions that CPU tests and CUDA kernels share.
#if defined(__CUDACC__)
#define PLATONIC_HD __host__ __device__ __forceinline__
#else
#define PLATONIC_HD inline __attribute__((always_inline))
#endif

namespace platonic {

// Passed from Python by _ops.py. device < 0: the CPU, on `threads` threads. device >= 0: that CUDA device, on the
// stream whose cudaStream_t is `stream`.
struct Launch {
    int device;
    int threads;
    void* stream;
};

constexpr bool has_cuda() {
#if defined(PLATONIC_CUDA)
    return true;
#else
    return false;
#endif
}

// Called by bindings where a CUDA kernel is asked of a build that has none.
[[noreturn]] inline void no_cuda(const char* kernel) {
    throw std::runtime_error(std::string(kernel) +
                             ": the tensors are on a CUDA device, but this build has no CUDA kernels. "
                             "Reinstall with nvcc on PATH and PLATONIC_CUDA=1.");
}

}  // namespace platonic
