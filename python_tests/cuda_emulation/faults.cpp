// Kernels with mistakes, which the emulation has to find, for ctypes.
#include <cassert>

#include "common/cuda_utils.cuh"
#include "exports.h"

namespace {

using platonic::launch;

__global__ void half_a_barrier(int* out) {
    if (threadIdx.x < 16) return;
    __syncthreads();
    out[0] = 1;
}

__global__ void barriers_apart(int* out) {
    if (threadIdx.x < 32) {
        out[0] = static_cast<int>(__ballot_sync(0xffffffffu, threadIdx.x < 8));
        return;
    }
    __syncthreads();
}

__global__ void lanes_that_do_not_come(int* out) {
    if (threadIdx.x % 32 < 20) out[0] = static_cast<int>(__ballot_sync(0xffffffffu, true));
}

__global__ void beyond_the_end(int* out) { out[threadIdx.x + 1] = 1; }

__global__ void shared_unwritten(int* out) {
    __shared__ int value[64];
    out[threadIdx.x] = value[threadIdx.x];
}

__global__ void asserts(int* out) {
    assert(threadIdx.x < 40 && "no more than 40");
    out[threadIdx.x] = 1;
}

__global__ void right(int* out) {
    __shared__ int sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    atomicAdd(&sum, __popc(__ballot_sync(0xffffffffu, threadIdx.x % 2)));
    __syncthreads();
    out[threadIdx.x] = sum;
}

}  // namespace

// Whether a mistake was found in the kernel; emulated_error() then says which.
extern "C" int run_faulty(int which, int* out) {
    using Kernel = void (*)(int*);
    const Kernel kernels[] = {half_a_barrier,   barriers_apart, lanes_that_do_not_come, beyond_the_end, asserts,
                              shared_unwritten, right};
    return emulation::guarded([&] { launch("faults", kernels[which], 1, 64, {0, 0, nullptr}, out); });
}
