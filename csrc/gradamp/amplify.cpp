// CPU drivers of amplify: work is cut by the shape alone, and partial sums are added in order.
#include "gradamp/amplify.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.h"
#include "gradamp/amplify_simd.h"

namespace platonic {
namespace {

constexpr int64_t task_elements = 1 << 16;  // some 20 microseconds of work

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_bytes(ElementType type) {
    return type == ElementType::float64 ? 8 : type == ElementType::float32 ? 4 : 2;
}

// Number i of what is float64 for logits of float64 and float32 for all others.
double arithmetic_at(ElementType type, const void* numbers, int64_t i) {
    return type == ElementType::float64 ? static_cast<const double*>(numbers)[i]
                                        : static_cast<const float*>(numbers)[i];
}

double factor_of(const AmplifyArgs& args) {
    return args.factor == nullptr ? 1 : arithmetic_at(args.type, args.factor, 0);
}

// Pixels of a chunk: all of its logits and gradients within half of a second-level cache of 1 MiB, but lines long
// enough for the hardware to prefetch.
int64_t chunk_pixels(const AmplifyArgs& args) {
    const int64_t fitting = (int64_t{1} << 19) / (2 * args.classes * element_bytes(args.type));
    return std::min(args.inner, std::clamp<int64_t>(fitting / 64 * 64, 256, amplify_max_pixels));
}

}  // namespace

namespace cpu {

void amplify(const AmplifyArgs& args, const Launch& on) {
    const double loss_scale = args.denominator == nullptr ? 1 : 1 / *args.denominator;
    const double scale = loss_scale * factor_of(args);
    std::vector<double> parts;
    if (args.outer * args.inner == 0 || args.classes == 0) {
        if (args.per_sample && !args.accumulate) std::fill_n(args.losses, args.outer * args.inner, 0.0);
    } else if (args.inner == 1) {
        const int64_t rows = std::max<int64_t>(1, task_elements / args.classes);
        parts.resize(divide_up(args.outer, rows));
        parallel_for(static_cast<int64_t>(parts.size()), on.threads, [&](int64_t t) {
            const int64_t first = t * rows, count = std::min(rows, args.outer - first);
            parts[t] = PLATONIC_DISPATCH(amplify_rows(args, scale, first, count));
        });
    } else {
        const int64_t pixels = chunk_pixels(args), chunks = divide_up(args.inner, pixels);
        parts.resize(args.outer * chunks);
        parallel_for(static_cast<int64_t>(parts.size()), on.threads, [&](int64_t t) {
            const int64_t first = t % chunks * pixels, count = std::min(pixels, args.inner - first);
            parts[t] = PLATONIC_DISPATCH(amplify_pixels(args, scale, t / chunks, first, count));
        });
    }
    if (args.per_sample) return;
    const double total = std::accumulate(parts.begin(), parts.end(), 0.0) * loss_scale;
    *args.losses = total + (args.accumulate ? *args.losses : 0);
}

void sum_denominator(const DenominatorArgs& args, const Launch& on) {
    std::vector<double> parts(divide_up(args.count, task_elements));
    parallel_for(static_cast<int64_t>(parts.size()), on.threads, [&](int64_t task) {
        const int64_t first = task * task_elements, last = std::min(args.count, first + task_elements);
        int64_t inside = 0, ignored = 0;
        for (int64_t i = first; i < last; ++i) {
            const bool skip = args.target[i] == args.ignore_index;
            ignored += skip;
            inside += !skip & (static_cast<uint64_t>(args.target[i]) < static_cast<uint64_t>(args.classes));
        }
        if (inside + ignored != last - first)
            for (int64_t i = first; i < last; ++i) {
                const int64_t t = args.target[i];
                if (t != args.ignore_index && (t < 0 || t >= args.classes))
                    throw std::out_of_range(
                        "Target " + std::to_string(t) + " is out of bounds: expected 0 <= target < " +
                        std::to_string(args.classes) + " or ignore_index (" + std::to_string(args.ignore_index) + ").");
            }
        double sum = static_cast<double>(inside);
        if (args.weight != nullptr) {
            sum = 0;
            for (int64_t i = first; i < last; ++i)
                if (const int64_t t = args.target[i]; t != args.ignore_index)
                    sum += args.is_double ? static_cast<const double*>(args.weight)[t]
                                          : static_cast<const float*>(args.weight)[t];
        }
        parts[task] = sum;
    });
    *args.denominator = std::accumulate(parts.begin(), parts.end(), 0.0);
}

void scale_gradient(const ScaleArgs& args, const Launch& on) {
    const bool is_double = args.type == ElementType::float64;
    if (!args.per_sample && arithmetic_at(args.type, args.factor, 0) == 1) return;
    // Lines with one factor (a row of classes, or everything), or with one for each element (the pixels of a class).
    const bool each = args.per_sample && args.inner > 1;
    const int64_t size = args.outer * args.classes * args.inner, bytes = element_bytes(args.type);
    const int64_t line = !args.per_sample ? task_elements : each ? args.inner : args.classes;
    if (size == 0) return;
    const int64_t lines = divide_up(size, line), group = std::max<int64_t>(1, task_elements / line);
    parallel_for(divide_up(lines, group), on.threads, [&](int64_t task) {
        for (int64_t i = task * group; i < std::min(lines, (task + 1) * group); ++i) {
            char* start = static_cast<char*>(args.grad) + i * line * bytes;
            const int64_t sample = !args.per_sample ? 0 : each ? i / args.classes * args.inner : i;
            const void* f = static_cast<const char*>(args.factor) + sample * (is_double ? 8 : 4);
            PLATONIC_DISPATCH(scale_line(args.type, start, std::min(line, size - i * line), f, each));
        }
    });
}

}  // namespace cpu
}  // namespace platonic
