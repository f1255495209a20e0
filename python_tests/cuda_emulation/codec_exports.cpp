// The codec's CUDA entry points for ctypes, with the parameters of csrc/weight_compression/bindings.cpp.
#include "exports.h"
#include "weight_compression/device_codec.h"

using namespace platonic;

namespace {

DeviceArray array(int dtype, int64_t item, int64_t n, void* data, int dimensions, const int64_t* sizes) {
    DeviceArray a{dtype, item, n, data, {dimensions, {}}};
    for (int d = 0; d < dimensions; ++d) a.shape.sizes[d] = sizes[d];
    return a;
}

}  // namespace

extern "C" {

int64_t compress_scratch_bytes(int64_t n) { return cuda::compress_scratch_bytes(n); }
int64_t decompress_scratch_bytes(int64_t n) { return cuda::decompress_scratch_bytes(n); }

int compress_on_device(int dtype, int64_t item, int64_t n, void* x, int dimensions, const int64_t* sizes, int quantise,
                       int keep_nonfinite, int rule, double value, int entropy_bits, double sample_fraction,
                       int try_sample, void* out, void* size, void* scratch) {
    return emulation::guarded([&] {
        const CompressCall call{array(dtype, item, n, x, dimensions, sizes),
                                quantise != 0,
                                keep_nonfinite != 0,
                                static_cast<LevelRule>(rule),
                                value,
                                entropy_bits,
                                sample_fraction,
                                try_sample != 0,
                                static_cast<uint8_t*>(out),
                                static_cast<int64_t*>(size),
                                scratch};
        cuda::compress(call, {0, 0, nullptr});
    });
}

int decompress_on_device(const void* payload, int64_t size, int dtype, int64_t item, int64_t n, void* out,
                         int dimensions, const int64_t* sizes, int accumulate, double scale, int check, void* status,
                         void* scratch) {
    return emulation::guarded([&] {
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
