// CPU driver of gram. Rows are cut into segments and segments into tasks, by the sizes of the data alone; a task merges
// its segments in row order, and the tasks' results are merged in task order.
#include "platonic/gram.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "common/parallel.h"
#include "platonic/gram_math.h"
#include "platonic/gram_simd.h"

namespace platonic {
namespace {

// Each task's result takes 8 p^2 bytes: at most 64 tasks and, above 4 of them, 64 MiB.
int64_t max_tasks(int64_t p) { return std::clamp<int64_t>((int64_t{1} << 23) / std::max<int64_t>(p * p, 1), 4, 64); }

// 64-byte aligned, zeroed.
template <class T>
class Buffer {
public:
    explicit Buffer(int64_t bytes) {
        const std::size_t size = (static_cast<std::size_t>(std::max<int64_t>(bytes, 1)) + 63) / 64 * 64;
        data_.reset(static_cast<T*>(std::aligned_alloc(64, size)));
        if (!data_) throw std::bad_alloc();
        std::fill_n(reinterpret_cast<char*>(data_.get()), size, 0);
    }
    T* get() const { return data_.get(); }

private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> data_;
};

// Mean and centred second moments (lower triangle) of a part of the rows.
struct Moments {
    std::vector<double> gram, mean;
    double total = 0;

    explicit Moments(int64_t p) : gram(p * p), mean(p) {}

    // Adds a part whose moments about its mean are moment(i, j).
    template <class Moment>
    void merge(const double* part_mean, double part_total, const Moment& moment) {
        if (!(part_total != 0)) return;  // a part without weight; NaN goes through
        const int64_t p = static_cast<int64_t>(mean.size());
        const double factor = merge_factor(total, part_total);
        std::vector<double> delta(p);
        for (int64_t i = 0; i < p; ++i) delta[i] = total == 0 ? 0 : part_mean[i] - mean[i];
        for (int64_t i = 0; i < p; ++i)
            for (int64_t j = 0; j <= i; ++j)
                gram[i * p + j] = merge_moment(gram[i * p + j], moment(i, j), delta[i], delta[j], factor);
        for (int64_t i = 0; i < p; ++i)
            mean[i] = total == 0 ? part_mean[i] : merge_mean(mean[i], delta[i], total, part_total);
        total += part_total;
    }
};

// The layer's weights and bias, padded with zeros to whole tiles.
struct PaddedLayer {
    Buffer<char> weight, bias;

    PaddedLayer(const GramArgs& args, const GramLayout& layout, int64_t bytes)
        : weight(args.columns * layout.weight_stride * bytes), bias(layout.weight_stride * bytes) {
        if (args.weight == nullptr) return;
        const char* from = static_cast<const char*>(args.weight);
        for (int64_t i = 0; i < args.columns; ++i)
            std::copy_n(from + i * args.width * bytes, args.width * bytes,
                        weight.get() + i * layout.weight_stride * bytes);
        if (args.bias != nullptr) std::copy_n(static_cast<const char*>(args.bias), args.width * bytes, bias.get());
    }
};

class Task {
public:
    Task(const GramArgs& args, const GramLayout& layout, const PaddedLayer& layer, int64_t bytes)
        : args_(args),
          layout_(layout),
          p_(args.width + args.targets),
          bytes_(bytes),
          panel_(gram_block_rows * layout.panel_stride * bytes),
          input_(gram_block_rows * layout.input_stride * bytes),
          shift_(layout.panel_stride * bytes),
          root_(gram_block_rows * bytes),
          moments_(layout.moment_rows * layout.moment_stride * 8),
          sums_(layout.panel_stride * 8),
          work_{panel_.get(),   input_.get(),       shift_.get(),
                root_.get(),    layer.weight.get(), layer.bias.get(),
                moments_.get(), sums_.get(),        0} {}

    void add_segment(int64_t first, int64_t rows, Moments& into) {
        PLATONIC_DISPATCH(gram_segment(args_, layout_, work_, first, rows));
        std::vector<double> mean(p_);
        for (int64_t i = 0; i < p_; ++i) mean[i] = shift(i) + work_.sums[i] / work_.total;
        into.merge(mean.data(), work_.total, [this](int64_t i, int64_t j) {
            return centre_moment(work_.moments[i * layout_.moment_stride + j], work_.sums[i], work_.sums[j],
                                 work_.total);
        });
    }

private:
    double shift(int64_t i) const {
        return bytes_ == 8 ? static_cast<const double*>(work_.shift)[i] : static_cast<const float*>(work_.shift)[i];
    }

    const GramArgs& args_;
    const GramLayout& layout_;
    const int64_t p_, bytes_;
    const Buffer<char> panel_, input_, shift_, root_;
    const Buffer<double> moments_, sums_;
    GramWorkspace work_;
};

// Short data is cut finer, so that several threads have work; never below the cost of waking one.
int64_t segment_rows(int64_t rows) {
    const int64_t wanted = (rows / 16 + gram_block_rows - 1) / gram_block_rows * gram_block_rows;
    return std::clamp<int64_t>(wanted, 8 * gram_block_rows, gram_segment_rows);
}

}  // namespace

// Enough slices to fill a device, while their partial results stay below 128 MiB.
namespace cpu {

void gram(const GramArgs& args, const Launch& on) {
    const int64_t p = args.width + args.targets, bytes = args.is_double ? 8 : 4;
    const GramLayout layout = PLATONIC_DISPATCH(gram_layout(args));
    const PaddedLayer layer(args, layout, bytes);
    const int64_t segment = segment_rows(args.rows);
    const int64_t segments = (args.rows + segment - 1) / segment;
    const int64_t tasks = std::min(segments, max_tasks(p));
    std::vector<std::unique_ptr<Moments>> parts(tasks);
    parallel_for(tasks, on.threads, [&](int64_t t) {
        Task task(args, layout, layer, bytes);
        auto part = std::make_unique<Moments>(p);
        for (int64_t s = segments * t / tasks; s < segments * (t + 1) / tasks; ++s)
            task.add_segment(s * segment, std::min(segment, args.rows - s * segment), *part);
        parts[t] = std::move(part);
    });
    Moments all(p);
    for (const auto& part : parts)
        all.merge(part->mean.data(), part->total, [&](int64_t i, int64_t j) { return part->gram[i * p + j]; });
    for (int64_t i = 0; i < p; ++i)
        for (int64_t j = 0; j <= i; ++j) args.gram[i * p + j] = args.gram[j * p + i] = all.gram[i * p + j];
    std::copy(all.mean.begin(), all.mean.end(), args.mean);
    *args.total = all.total;
}

}  // namespace cpu
}  // namespace platonic
