// What every bindings.cpp needs: addresses as pointers, and the choice between a kernel's twins.
#pragma once

#include <cstdint>

#include "common/launch.h"

// Runs kernel(args, on) where `on` says.
#if defined(PLATONIC_CUDA)
#define PLATONIC_ON_DEVICE(kernel, args, on) ((on).device < 0 ? cpu::kernel(args, on) : cuda::kernel(args, on))
#else
#define PLATONIC_ON_DEVICE(kernel, args, on) ((on).device < 0 ? cpu::kernel(args, on) : no_cuda(#kernel))
#endif

namespace platonic {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace platonic
