// compress and decompress on CUDA: which kernels run, in what order. Each is told of the call and of the scratch; those
// of modes that the tensor does not get return at once, because only the device knows which it gets.
//
//   find_extents -> settle_range -> count_sample -> choose_levels -> quantize_values   values to symbols
//   choose_mode [-> measure_blocks -> reconsider_code]                                numbers of symbols to a code
//   measure_blocks -> lay_out -> encode_coded | encode_fixed | encode_raw             symbols to blocks
//   seal_blocks -> seal_header                                                        checksums, the size
//
//   parse_header -> check_ranges -> compare_checksums                                 and back
//   decode_coded | decode_fixed | decode_planes | decode_exact
#include "weight_compression/device_codec.h"
#include "weight_compression/device_decode.cuh"
#include "weight_compression/device_decode_planes.cuh"
#include "weight_compression/device_encode.cuh"
#include "weight_compression/device_quantize.cuh"

namespace platonic {
namespace cuda {
namespace {

// Values of a grid's block that it is worth to start one for.
constexpr int64_t block_values = 4 * quads_at_once * grid_threads;

void make_symbols(const CompressCall& call, const CompressScratch& scratch, const Launch& on) {
    const int64_t n = call.x.n, runs = n <= sample_everything ? 1 : sample_runs(n, call.sample_fraction);
    const int64_t sample = n <= sample_everything ? n : runs * sample_run;
    const unsigned parts = grid_of(n, block_values, on.device);
    with_dtype(call.x.dtype, [&](auto type) {
        typedef decltype(type) T;
        const auto* x = static_cast<const typename T::Bits*>(call.x.data);
        launch("compress: find_extents", find_extents<T>, parts, grid_threads, on, x, n, scratch);
        launch("compress: settle_range", settle_range<T>, 1, grid_threads, on, call, parts, scratch);
        const unsigned sample_grid = grid_of(sample, 4 * grid_threads, on.device);
        launch("compress: count_sample", count_sample<T>, sample_grid, grid_threads, on, call, runs, false, scratch);
        launch("compress: choose_levels", choose_levels<T>, 1, single_threads, on, call, scratch);
        if (call.try_sample)
            launch("compress: count_sample", count_sample<T>, sample_grid, grid_threads, on, call, runs, true, scratch);
        launch("compress: quantize_values", quantize_values<T>, grid_of(n, 2 * block_values, on.device),
               quantize_threads, on, call, scratch);
    });
    launch("compress: choose_mode", choose_mode, 1, single_threads, on, call, scratch);
    launch("compress: measure_blocks", measure_blocks, block_count(n), grid_threads, on, n, false, scratch);
    if (!call.try_sample) return;
    launch("compress: reconsider_code", reconsider_code, 1, single_threads, on, call, scratch);
    launch("compress: measure_blocks", measure_blocks, block_count(n), grid_threads, on, n, true, scratch);
}

// Thread blocks of a kernel that takes `each` payload blocks.
int64_t coding_grid(int64_t n, int each) { return (block_count(n) + each - 1) / each; }

// Payload blocks at most, whatever the mode.
int64_t most_blocks(const DeviceArray& x) {
    const int64_t raw = raw_blocks(x.n * x.item), coded = block_count(x.n);
    return raw > coded ? raw : coded;
}

}  // namespace

int64_t compress_scratch_bytes(int64_t item, int64_t n) { return CompressScratch(nullptr, item, n).size; }

void compress(const CompressCall& call, const Launch& on) {
    const DeviceGuard guard(on.device);
    const CompressScratch scratch(call.scratch, call.x.item, call.x.n);
    const int64_t n = call.x.n;
    check_cuda(cudaMemsetAsync(call.scratch, 0, scratch.zeroed, stream_of(on)), "compress: zeros");
    if (call.quantise) make_symbols(call, scratch, on);
    launch("compress: lay_out", lay_out, 1, single_threads, on, call, scratch);
    if (n > 0) {
        if (call.quantise) {
            launch("compress: encode_coded", encode_coded, coding_grid(n, coding_blocks), coding_threads, on, call,
                   scratch);
            launch("compress: encode_fixed", encode_fixed, grid_of(n, 8 * grid_threads, on.device), grid_threads, on,
                   call, scratch);
        }
        launch("compress: encode_raw", encode_raw, grid_of(n * call.x.item, 16 * grid_threads, on.device), grid_threads,
               on, call, scratch);
        launch("compress: seal_blocks", seal_blocks, most_blocks(call.x), crc32c_threads, on, call, scratch);
    }
    launch("compress: seal_header", seal_header, 1, crc32c_threads, on, call, scratch);
}

int64_t decompress_scratch_bytes(int dtype, int64_t item, int64_t n) {
    return DecompressScratch(nullptr, dtype, item, n).size;
}

void decompress(const DecompressCall& call, const Launch& on) {
    const DeviceGuard guard(on.device);
    const DeviceArray& out = call.out;
    const DecompressScratch scratch(call.scratch, out.dtype, out.item, out.n);
    launch("decompress: parse_header", parse_header, 1, parse_threads, on, call, scratch);
    if (out.n == 0) return;
    const bool real = out.dtype <= static_cast<int>(DType::bfloat16);
    const int64_t units = unit_count(out.dtype, out.n);
    const unsigned grid = grid_of(out.n, 8 * grid_threads, on.device);
    if (real)
        with_dtype(out.dtype, [&](auto type) {
            launch("decompress: check_ranges", check_ranges<decltype(type)>, grid, grid_threads, on, call, scratch);
        });
    if (call.check)
        launch("decompress: compare_checksums", compare_checksums, block_count(units), crc32c_threads, on, call,
               scratch);
    if (!call.accumulate) {
        launch("decompress: decode_exact", decode_exact, grid, grid_threads, on, call, scratch);
        with_unit(unit_width(out.dtype, out.item), [&](auto unit) {
            launch("decompress: decode_planes", decode_planes<Stored<decltype(unit)>>,
                   coding_grid(units, decoding_blocks), decoding_threads, on, call, scratch);
        });
    }
    if (!real) return;
    with_dtype(out.dtype, [&](auto type) {
        typedef decltype(type) T;
        if (call.accumulate) {
            launch("decompress: add_exact", add_exact<T>, grid, grid_threads, on, call, scratch);
            launch("decompress: decode_planes", decode_planes<Added<T>>, coding_grid(out.n, decoding_blocks),
                   decoding_threads, on, call, scratch);
        }
        launch("decompress: decode_fixed", decode_fixed<T>, grid, grid_threads, on, call, scratch);
        launch("decompress: decode_coded", decode_coded<T>, coding_grid(out.n, decoding_blocks), decoding_threads, on,
               call, scratch);
    });
}

}  // namespace cuda
}  // namespace platonic
