// Python's way to whole payloads on a CUDA device; see bindings.cpp. Called by weight_compression/_device_ops.py only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "weight_compression/device_codec.h"

namespace py = pybind11;

namespace platonic {

#if !defined(PLATONIC_CUDA)
namespace cuda {
int64_t compress_scratch_bytes(const CompressCall&) { no_cuda("compress"); }
int64_t decompress_scratch_bytes(int, int64_t, int64_t) { no_cuda("decompress"); }
void compress(const CompressCall&, const Launch&) { no_cuda("compress"); }
void decompress(const DecompressCall&, const Launch&) { no_cuda("decompress"); }
}  // namespace cuda
#endif

namespace {

DeviceArray array(int dtype, int64_t item, int64_t n, uintptr_t data, const std::vector<int64_t>& sizes) {
    DeviceArray a{dtype, item, n, reinterpret_cast<void*>(data), {static_cast<int>(sizes.size()), {}}};
    for (size_t d = 0; d < sizes.size(); ++d) a.shape.sizes[d] = sizes[d];
    return a;
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Launch on_device(int device, int threads, uintptr_t stream) {
    return {device, threads, reinterpret_cast<void*>(stream)};
}

}  // namespace

void bind_device_codec(py::module_& m) {
    m.def(
        "compress_scratch_bytes",
        [](int dtype, int64_t item, int64_t n, int way, int64_t group_size, int64_t cut) {
            CompressCall call{};
            call.x = array(dtype, item, n, 0, {});
            call.way = static_cast<Way>(way);
            call.group_size = group_size;
            call.cut = cut;
            return cuda::compress_scratch_bytes(call);
        },
        "Of a call with these.");
    m.def("decompress_scratch_bytes", &cuda::decompress_scratch_bytes, py::arg("dtype"), py::arg("item"), py::arg("n"));
    m.def(
        "compress_on_device",
        [](int dtype, int64_t item, int64_t n, uintptr_t x, const std::vector<int64_t>& sizes, int way,
           int64_t group_size, int64_t cut, bool keep_nonfinite, int rule, double value, int entropy_bits,
           double sample_fraction, bool try_sample, uintptr_t out, uintptr_t size, uintptr_t scratch, int device,
           int threads, uintptr_t stream) {
            py::gil_scoped_release release;
            const CompressCall call{array(dtype, item, n, x, sizes),
                                    static_cast<Way>(way),
                                    keep_nonfinite,
                                    static_cast<LevelRule>(rule),
                                    value,
                                    entropy_bits,
                                    sample_fraction,
                                    try_sample,
                                    group_size,
                                    cut,
                                    pointer<uint8_t>(out),
                                    pointer<int64_t>(size),
                                    pointer<void>(scratch)};
            cuda::compress(call, on_device(device, threads, stream));
        },
        "A payload and its size, or -1, queued on the stream.");
    m.def(
        "decompress_on_device",
        [](uintptr_t payload, int64_t size, int dtype, int64_t item, int64_t n, uintptr_t out,
           const std::vector<int64_t>& sizes, bool accumulate, double scale, bool check, uintptr_t status,
           uintptr_t scratch, int device, int threads, uintptr_t stream) {
            py::gil_scoped_release release;
            const DecompressCall call{pointer<const uint8_t>(payload),
                                      size,
                                      array(dtype, item, n, out, sizes),
                                      accumulate,
                                      scale,
                                      check,
                                      pointer<int32_t>(status),
                                      pointer<void>(scratch)};
            cuda::decompress(call, on_device(device, threads, stream));
        },
        "The tensor of a payload and a status, 0 if it is one, queued on the stream.");
}

}  // namespace platonic
