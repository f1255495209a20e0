// What encoding needs to know of a tensor. Sizes alone decide how it is cut: results are the same for any number of
// threads.
#include <cstring>
#include <vector>

#include "common/exact_denormals.h"
#include "common/parallel.h"
#include "weight_compression/blocks.h"
#include "weight_compression/codec.h"
#include "weight_compression/count_simd.h"
#include "weight_compression/levels.h"

namespace platonic {
namespace cpu {

namespace {

constexpr int64_t piece = 1 << 15;  // values: what has just been read is still near when the sample is taken

// Copies the runs of the sample that start in [first, end).
void copy_runs(const Values& x, int64_t runs, int64_t first, int64_t end, char* sample) {
    const int64_t item = item_bytes(x.dtype), apart = x.n / runs;
    const char* data = static_cast<const char*>(x.data);
    for (int64_t r = pieces(first, apart); r < runs && r * apart < end; ++r)
        memcpy(sample + r * sample_run * item, data + r * apart * item, sample_run * item);
}

void widen(Range* range, const Range& other) {
    if (other.lo < range->lo) range->lo = other.lo;
    if (other.hi > range->hi) range->hi = other.hi;
    range->finite = range->finite && other.finite;
}

}  // namespace

Range value_range(const Values& x, double fraction, void* sample, const Launch& on) {
    const ExactDenormals exact;
    const bool everything = x.n <= sample_everything;
    const int64_t runs = sample && !everything ? sample_runs(x.n, fraction) : 0;
    std::vector<Range> parts(pieces(x.n, segment));
    parallel_for(static_cast<int64_t>(parts.size()), on.threads, [&](int64_t task) {
        const int64_t begin = task * segment, end = smaller(begin + segment, x.n);
        for (int64_t first = begin; first < end; first += piece) {
            const int64_t stop = smaller(first + piece, end);
            const Range range = PLATONIC_DISPATCH(value_range(x, first, stop - first));
            if (first == begin)
                parts[task] = range;
            else
                widen(&parts[task], range);
            if (runs > 0) copy_runs(x, runs, first, stop, static_cast<char*>(sample));
        }
    });
    if (sample && everything) memcpy(sample, x.data, x.n * item_bytes(x.dtype));
    for (const Range& part : parts) widen(&parts[0], part);
    return parts[0];
}

namespace {

// Half the widest range that the levels divide.
double half_width(const Scheme& scheme, DType dtype, int64_t n) {
    if (!scheme.ranges) return scheme.hi / 2 - scheme.lo / 2;
    double widest = 0;
    for (int64_t g = 0; g < pieces(n, scheme.group_size); ++g) {
        const GroupRange range = group_range(scheme, dtype, g);
        const double half = range.hi / 2 - range.lo / 2;
        if (half > widest) widest = half;
    }
    return widest;
}

// A value of the dtype.
void store_value(DType dtype, double value, void* data, int64_t at) {
    if (dtype == DType::float64)
        static_cast<double*>(data)[at] = value;
    else if (dtype == DType::float32)
        static_cast<float*>(data)[at] = static_cast<float>(value);
    else if (dtype == DType::float16)
        static_cast<uint16_t*>(data)[at] = float_to_half(static_cast<float>(value));
    else
        static_cast<uint16_t*>(data)[at] = float_to_bfloat(static_cast<float>(value));
}

}  // namespace

void group_ranges(const Values& x, int64_t size, void* ranges, const Launch& on) {
    const ExactDenormals exact;
    const int64_t groups = pieces(x.n, size), batch = pieces(segment, size);
    parallel_for(pieces(groups, batch), on.threads, [&](int64_t task) {
        for (int64_t g = task * batch; g < smaller((task + 1) * batch, groups); ++g) {
            const Range range = PLATONIC_DISPATCH(value_range(x, g * size, smaller(size, x.n - g * size)));
            store_value(x.dtype, range.lo, ranges, 2 * g);
            store_value(x.dtype, range.hi, ranges, 2 * g + 1);
        }
    });
}

int64_t levels_of_error(const Scheme& scheme, DType dtype, int64_t n, double max_error) {
    const ExactDenormals exact;
    return platonic::levels_of_error(half_width(scheme, dtype, n), max_error);
}

double error_bound(const Scheme& scheme, DType dtype, int64_t n) {
    const ExactDenormals exact;
    return half_width(scheme, dtype, n) / static_cast<double>(scheme.levels);
}

void count_outside(const Values& x, double lo, double hi, uint32_t* counts, const Launch& on) {
    const ExactDenormals exact;
    parallel_for(block_count(x.n), on.threads, [&](int64_t b) {
        uint16_t* positions = thread_buffer<uint16_t, 0>(block_symbols);
        counts[b] = static_cast<uint32_t>(
            PLATONIC_DISPATCH(find_outside(x, lo, hi, b * block_symbols, symbols_of_block(x.n, b), positions)));
    });
}

void sample_counts(const Values& x, const Scheme& scheme, double fraction, int64_t* counts) {
    const ExactDenormals exact;
    const Quantization z = make_quantization(x.dtype, scheme);
    for (int64_t i = 0; i < scheme.levels; ++i) counts[i] = 0;
    uint16_t symbols[sample_everything];
    const bool all = x.n <= sample_everything;
    const int64_t runs = all ? 1 : sample_runs(x.n, fraction), run = all ? x.n : sample_run;
    const char* data = static_cast<const char*>(x.data);
    const int64_t item = item_bytes(x.dtype), apart = x.n / runs;
    for (int64_t r = 0; r < runs; ++r) {
        // Runs lie too far apart for the hardware to see them coming.
        if (r + 16 < runs)
            for (int64_t line = 0; line < run * item; line += 64)
                __builtin_prefetch(data + (r + 16) * apart * item + line);
        PLATONIC_DISPATCH(quantize_chunk(x, z, r * apart, run, symbols));
        for (int64_t i = 0; i < run; ++i) ++counts[symbols[i]];
    }
}

void symbol_counts(const Values& x, const Scheme& scheme, int64_t* counts, const Launch& on) {
    const ExactDenormals exact;
    const Quantization z = make_quantization(x.dtype, scheme);
    const int64_t tasks = pieces(x.n, segment), levels = scheme.levels;
    std::vector<int64_t> parts(tasks * levels);
    parallel_for(tasks, on.threads, [&](int64_t task) {
        struct alignas(64) Counters {
            uint8_t bytes[counter_bytes];
        };
        Counters* counters = thread_buffer<Counters, 0>(1);
        const int64_t first = task * segment;
        PLATONIC_DISPATCH(
            count_symbols(x, z, first, smaller(segment, x.n - first), &parts[task * levels], counters->bytes));
    });
    for (int64_t s = 0; s < levels; ++s) {
        counts[s] = 0;
        for (int64_t task = 0; task < tasks; ++task) counts[s] += parts[task * levels + s];
    }
}

}  // namespace cpu
}  // namespace platonic
