// CPU driver of the passes of sorted_pca: tasks of whole chunks of rows, cut by the number of rows alone.
#include "platonic/sorted_pca.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "platonic/sorted_pca_simd.h"

namespace platonic {
namespace {

constexpr int64_t max_tasks = 64;

int64_t chunks_of(int64_t rows) { return (rows + product_chunk_rows - 1) / product_chunk_rows; }

// [count, p] to [count, padded size], zeros in between.
template <class T>
std::vector<T> pad(const void* from, int64_t count, int64_t p, const PaddedColumns& padded) {
    std::vector<T> to(count * padded.size);
    for (int64_t b = 0; b < count; ++b)
        for (int64_t c = 0; c < p; ++c) to[b * padded.size + padded.at(c)] = static_cast<const T*>(from)[b * p + c];
    return to;
}

template <class T>
void run_product(const CentredProductArgs& args, const Launch& on) {
    const PaddedColumns padded(args.data);
    const int64_t p = args.data.columns + args.data.targets, size = (args.count + 1) * padded.size;
    const std::vector<T> shift = pad<T>(args.shift, 1, p, padded),
                         vectors = pad<T>(args.vectors, args.count, p, padded);
    const int64_t chunks = chunks_of(args.data.rows), tasks = std::min(chunks, max_tasks);
    std::vector<std::vector<double>> parts(tasks);
    parallel_for(tasks, on.threads, [&](int64_t t) {
        std::vector<T> chunk(size);
        std::vector<double> part(size);
        for (int64_t k = chunks * t / tasks; k < chunks * (t + 1) / tasks; ++k) {
            const int64_t first = k * product_chunk_rows;
            const int64_t rows = std::min(product_chunk_rows, args.data.rows - first);
            std::fill(chunk.begin(), chunk.end(), T(0));
            PLATONIC_DISPATCH(product_chunk(args, padded, shift.data(), vectors.data(), first, rows, chunk.data()));
            for (int64_t i = 0; i < size; ++i) part[i] += chunk[i];
        }
        parts[t] = std::move(part);
    });
    std::vector<double> all(size);
    for (const auto& part : parts)
        for (int64_t i = 0; i < size; ++i) all[i] += part[i];
    for (int64_t b = 0; b < args.count; ++b)
        for (int64_t c = 0; c < p; ++c) args.product[b * p + c] = all[b * padded.size + padded.at(c)];
    for (int64_t c = 0; args.sums != nullptr && c < p; ++c) args.sums[c] = all[args.count * padded.size + padded.at(c)];
}

}  // namespace

namespace cpu {

void centred_product(const CentredProductArgs& args, const Launch& on) {
    if (args.data.is_double)
        run_product<double>(args, on);
    else
        run_product<float>(args, on);
}

void project_rows(const ProjectRowsArgs& args, const Launch& on) {
    const PaddedColumns padded(args.data);
    const int64_t p = args.data.columns + args.data.targets;
    const std::vector<double> shift = pad<double>(args.shift, 1, p, padded);
    const std::vector<double> direction = pad<double>(args.direction, 1, p, padded);
    parallel_for(chunks_of(args.data.rows), on.threads, [&](int64_t k) {
        const int64_t first = k * product_chunk_rows;
        const int64_t rows = std::min(product_chunk_rows, args.data.rows - first);
        PLATONIC_DISPATCH(project_chunk(args, padded, shift.data(), direction.data(), first, rows));
    });
}

}  // namespace cpu
}  // namespace platonic
