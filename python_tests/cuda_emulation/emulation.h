// Blocks of CUDA threads on the CPU: every thread is a fiber, which runs until it has to wait for others.
//
// What a GPU would leave undefined is an error here: threads of a block that wait at different places, a lane of a
// warp's mask that never comes or comes with another mask; an assertion that fails is one too. Shared memory is filled
// with rubbish before every block. Memory from `allocate` lies against a page that cannot be touched; a kernel that
// leaves it is stopped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 gridDim, blockDim, blockIdx, threadIdx;

// Runs `thread` for all threads of a grid. Throws std::runtime_error for the errors above.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// The shared memory that the launch asked for.
void* dynamic_shared();

// Whether threads run from the last to the first: what comes out must not depend on it.
void set_backwards(bool backwards);

// Until all threads of the block are here; whether `x` was true in one.
bool barrier(bool x);

enum class Collective { sync, ballot, shuffle_xor, shuffle_up, shuffle_down, match };

// Until all lanes of `mask` are here with the same `kind`; what the lane gets.
uint64_t exchange(Collective kind, uint32_t mask, uint64_t value, int argument);

// `size` bytes that end, or begin, at memory that cannot be touched.
void* allocate(size_t size, bool at_end);
void release(void* memory, size_t size, bool at_end);

}  // namespace emulation
