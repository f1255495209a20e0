// CPU driver: a task is a tile of rolling_lanes segments.
#include "platonic/rolling_ridge.h"

#include <memory>
#include <new>

#include "common/parallel.h"
#include "platonic/rolling_ridge_simd.h"

namespace platonic {
namespace {

struct AlignedFree {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

template <class T>
void run(const RollingRidge<T>& task, const Launch& on) {
    const int64_t bytes = PLATONIC_DISPATCH(rolling_scratch(task.p, task.r, task.intercepts != nullptr));
    const int64_t rows = PLATONIC_DISPATCH(rolling_lanes()) * task.segment;
    parallel_for((task.n + rows - 1) / rows, on.threads, [&](int64_t tile) {
        const std::unique_ptr<void, AlignedFree> scratch(
            ::operator new(static_cast<size_t>(bytes), std::align_val_t(64)));
        PLATONIC_DISPATCH(rolling_tile(task, tile, scratch.get()));
    });
}

}  // namespace

namespace cpu {
void rolling_ridge(const RollingRidge<float>& task, const Launch& on) { run(task, on); }
void rolling_ridge(const RollingRidge<double>& task, const Launch& on) { run(task, on); }
}  // namespace cpu

}  // namespace platonic
