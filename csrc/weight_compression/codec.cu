// compress and decompress on CUDA: which kernels run, in what order. Each is told of the call and of the scratch; those
// of modes that the tensor does not get return at once, because only the device knows which it gets.
//
//   find_extents -> settle_range [-> find_group_ranges -> survey_groups]              the range of all, and of groups
//   [count_digits -> pick_digits, a few times -> count_outside]                       or without the outermost values
//   count_sample -> choose_levels [-> quantize_values -> judge_levels, a few times]   the levels
//   quantize_values -> choose_mode [-> measure_blocks -> reconsider_code]             symbols, and their code
//   [unclip, and once more from count_sample on]
//   count_planes -> choose_planes -> measure_planes                                   or planes of bytes
//   measure_blocks -> lay_out -> encode_*                                             symbols to blocks
//   seal_blocks -> seal_header                                                        checksums, the size
//
//   parse_header -> check_ranges -> compare_checksums -> decode_*                     and back
#include "weight_compression/device_clip.cuh"
#include "weight_compression/device_codec.h"
#include "weight_compression/device_decode.cuh"
#include "weight_compression/device_decode_planes.cuh"
#include "weight_compression/device_encode.cuh"
#include "weight_compression/device_encode_planes.cuh"
#include "weight_compression/device_groups.cuh"
#include "weight_compression/device_quantize.cuh"

namespace platonic {
namespace cuda {
namespace {

// Values of a grid's block that it is worth to start one for.
constexpr int64_t block_values = 4 * quads_at_once * grid_threads;

unsigned sample_grid(const Sample& sample, const Launch& on) {
    return grid_of(sample.size, 4 * grid_threads, on.device);
}

// Thread blocks of a kernel that takes `each` payload blocks.
int64_t coding_grid(int64_t n, int each) { return (block_count(n) + each - 1) / each; }

// The range or the ranges that the levels divide.
template <class T>
void find_ranges(const CompressCall& call, const Sample& sample, const CompressScratch& scratch, const Launch& on) {
    const int64_t n = call.x.n;
    const auto* x = static_cast<const typename T::Bits*>(call.x.data);
    const unsigned parts = grid_of(n, block_values, on.device);
    launch("compress: find_extents", find_extents<T>, parts, grid_threads, on, x, n, scratch);
    launch("compress: settle_range", settle_range<T>, 1, grid_threads, on, call, parts, sample.size, scratch);
    if (call.group_size > 0) {
        launch("compress: find_group_ranges", find_group_ranges<T>, parts, grid_threads, on, call, scratch);
        launch("compress: survey_groups", survey_groups<T>,
               grid_of(group_count(n, call.group_size), grid_threads, on.device), grid_threads, on, call, scratch);
    }
    if (call.cut == 0) return;
    for (int pass = 0; pass < digit_passes<typename T::Real>; ++pass) {
        launch("compress: count_digits", count_digits<T>, sample_grid(sample, on), grid_threads, on, call, sample, pass,
               scratch);
        launch("compress: pick_digits", pick_digits<T>, 1, single_threads, on, pass, scratch);
    }
    launch("compress: count_outside", count_outside<T>, block_count(n), grid_threads, on, call, scratch);
}

// Levels, symbols, and the code that fits them.
template <class T>
void make_symbols(const CompressCall& call, const Sample& sample, const CompressScratch& scratch, const Launch& on) {
    const int64_t n = call.x.n;
    const unsigned quantize_grid = grid_of(n, 2 * block_values, on.device);
    const auto count = [&](bool in_levels) {
        launch("compress: count_sample", count_sample<T>, sample_grid(sample, on), grid_threads, on, call, sample,
               in_levels, scratch);
    };
    count(false);
    launch("compress: choose_levels", choose_levels, 1, single_threads, on, call, scratch);
    for (int t = 0; call.rule == LevelRule::ratio && t < ratio_tries; ++t) {
        launch("compress: count_symbols", quantize_values<T, false>, quantize_grid, quantize_threads, on, call,
               scratch);
        launch("compress: judge_levels", judge_levels, 1, single_threads, on, call, scratch);
    }
    if (call.try_sample) count(true);
    launch("compress: quantize_values", quantize_values<T, true>, quantize_grid, quantize_threads, on, call, scratch);
    launch("compress: choose_mode", choose_mode, 1, single_threads, on, call, scratch);
    launch("compress: measure_blocks", measure_blocks, block_count(n), grid_threads, on, n, false, scratch);
    if (!call.try_sample) return;
    launch("compress: reconsider_code", reconsider_code, 1, single_threads, on, call, scratch);
    launch("compress: measure_blocks", measure_blocks, block_count(n), grid_threads, on, n, true, scratch);
}

void plan_quantised(const CompressCall& call, const CompressScratch& scratch, const Launch& on) {
    const Sample sample(call.x.n, call.sample_fraction);
    with_dtype(call.x.dtype, [&](auto type) {
        typedef decltype(type) T;
        find_ranges<T>(call, sample, scratch, on);
        make_symbols<T>(call, sample, scratch, on);
        if (call.cut == 0) return;
        launch("compress: unclip", unclip, 1, single_threads, on, scratch);
        make_symbols<T>(call, sample, scratch, on);
    });
}

void write_quantised(const CompressCall& call, const CompressScratch& scratch, const Launch& on) {
    const int64_t n = call.x.n;
    const unsigned grid = grid_of(n, 8 * grid_threads, on.device);
    launch("compress: encode_coded", encode_coded, coding_grid(n, coding_blocks), coding_threads, on, call, scratch);
    launch("compress: encode_fixed", encode_fixed, grid, grid_threads, on, call, scratch);
    with_dtype(call.x.dtype, [&](auto type) {
        typedef decltype(type) T;
        if (call.group_size > 0)
            launch("compress: encode_ranges", encode_ranges<T>, grid, grid_threads, on, call, scratch);
        if (call.cut > 0)
            launch("compress: encode_escapes", encode_escapes<T>, block_count(n), grid_threads, on, call, scratch);
    });
}

void plan_planes(const CompressCall& call, const CompressScratch& scratch, const Launch& on) {
    const int64_t units = unit_count(call.x.dtype, call.x.n);
    const int width = unit_width(call.x.dtype, call.x.item);
    const Sample sample(units, plane_sample_fraction);
    with_unit(width, [&](auto unit) {
        typedef decltype(unit) U;
        if (call.try_sample) {
            launch("compress: count_planes", count_planes<U>, sample_grid(sample, on), quantize_threads, on, call,
                   sample, true, scratch);
            launch("compress: weigh_planes", weigh_planes, 1, single_threads, on, call, scratch);
        }
        launch("compress: count_planes", count_planes<U>, grid_of(units, 2 * block_values, on.device), quantize_threads,
               on, call, sample, false, scratch);
        launch("compress: choose_planes", choose_planes, 1, single_threads, on, call, scratch);
        launch("compress: measure_planes", measure_planes<U>, width * block_count(units), grid_threads, on, call,
               scratch);
    });
}

void write_planes(const CompressCall& call, const CompressScratch& scratch, const Launch& on) {
    const int64_t units = unit_count(call.x.dtype, call.x.n), each = coding_grid(units, coding_blocks);
    const int width = unit_width(call.x.dtype, call.x.item);
    with_unit(width, [&](auto unit) {
        typedef decltype(unit) U;
        launch("compress: encode_planes", encode_planes<U>, width * each, coding_threads, on, call, each, scratch);
        launch("compress: copy_planes", copy_planes<U>, grid_of(units, 4 * grid_threads, on.device), grid_threads, on,
               call, scratch);
    });
}

}  // namespace

int64_t compress_scratch_bytes(const CompressCall& call) { return CompressScratch(nullptr, call).size; }

void compress(const CompressCall& call, const Launch& on) {
    const DeviceGuard guard(on.device);
    const CompressScratch scratch(call.scratch, call);
    const DeviceArray& x = call.x;
    check_cuda(cudaMemsetAsync(call.scratch, 0, scratch.zeroed, stream_of(on)), "compress: zeros");
    if (call.way == Way::quantised) plan_quantised(call, scratch, on);
    if (call.way == Way::planes) plan_planes(call, scratch, on);
    launch("compress: lay_out", lay_out, 1, single_threads, on, call, scratch);
    if (x.n > 0) {
        if (call.way == Way::quantised) write_quantised(call, scratch, on);
        if (call.way == Way::planes) write_planes(call, scratch, on);
        launch("compress: encode_raw", encode_raw, grid_of(x.n * x.item, 16 * grid_threads, on.device), grid_threads,
               on, call, scratch);
        launch("compress: seal_blocks", seal_blocks, block_count(unit_count(x.dtype, x.n)), crc32c_threads, on, call,
               scratch);
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
