// The codec's CUDA entry points for ctypes, with the parameters of csrc/weight_compression/bindings.cpp.
#include <exception>
#include <string>

#include "emulation.h"
#include "weight_compression/device_codec.h"

using namespace platonic;

namespace {

std::string message;

DeviceArray array(int dtype, int64_t item, int64_t n, void* data, int dimensions, const int64_t* sizes) {
    DeviceArray a{dtype, item, n, data, {dimensions, {}}};
    for (int d = 0; d < dimensions; ++d) a.shape.sizes[d] = sizes[d];
    return a;
}

// 0, or 1 and a message.
template <class F>
int guarded(const F& run) {
    try {
        run();
        return 0;
    } catch (const std::exception& e) {
        message = e.what();
        return 1;
    }
}

}  // namespace

extern "C" {

const char* emulated_error() { return message.c_str(); }
void emulated_backwards(int backwards) { emulation::set_backwards(backwards != 0); }
void* emulated_allocate(int64_t size, int at_end) {
    return emulation::allocate(static_cast<size_t>(size), at_end != 0);
}
void emulated_release(void* memory, int64_t size, int at_end) {
    emulation::release(memory, static_cast<size_t>(size), at_end != 0);
}

int64_t compress_scratch_bytes(int dtype, int64_t item, int64_t n, int way, int64_t group_size, int64_t cut) {
    CompressCall call{};
    call.x = array(dtype, item, n, nullptr, 0, nullptr);
    call.way = static_cast<Way>(way);
    call.group_size = group_size;
    call.cut = cut;
    return cuda::compress_scratch_bytes(call);
}
int64_t decompress_scratch_bytes(int dtype, int64_t item, int64_t n) {
    return cuda::decompress_scratch_bytes(dtype, item, n);
}

int compress_on_device(int dtype, int64_t item, int64_t n, void* x, int dimensions, const int64_t* sizes, int way,
                       int64_t group_size, int64_t cut, int keep_nonfinite, int rule, double value, int entropy_bits,
                       double sample_fraction, int try_sample, void* out, void* size, void* scratch) {
    return guarded([&] {
        const CompressCall call{array(dtype, item, n, x, dimensions, sizes),
                                static_cast<Way>(way),
                                keep_nonfinite != 0,
                                static_cast<LevelRule>(rule),
                                value,
                                entropy_bits,
                                sample_fraction,
                                try_sample != 0,
                                group_size,
                                cut,
                                static_cast<uint8_t*>(out),
                                static_cast<int64_t*>(size),
                                scratch};
        cuda::compress(call, {0, 0, nullptr});
    });
}

int decompress_on_device(const void* payload, int64_t size, int dtype, int64_t item, int64_t n, void* out,
                         int dimensions, const int64_t* sizes, int accumulate, double scale, int check, void* status,
                         void* scratch) {
    return guarded([&] {
        const DecompressCall call{static_cast<const uint8_t*>(payload),
                                  size,
                                  array(dtype, item, n, out, dimensions, sizes),
                                  accumulate != 0,
                                  scale,
                                  check != 0,
                                  static_cast<int32_t*>(status),
                                  scratch};
        cuda::decompress(call, {0, 0, nullptr});
    });
}

}  // extern "C"
