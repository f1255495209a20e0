// The emulation itself for ctypes.
#include <cstdint>

#include "emulation.h"
#include "exports.h"

extern "C" {

const char* emulated_error() { return emulation::message().c_str(); }
void emulated_backwards(int backwards) { emulation::set_backwards(backwards != 0); }
void* emulated_allocate(int64_t size, int at_end) {
    return emulation::allocate(static_cast<size_t>(size), at_end != 0);
}
void emulated_release(void* memory, int64_t size, int at_end) {
    emulation::release(memory, static_cast<size_t>(size), at_end != 0);
}

}  // extern "C"
