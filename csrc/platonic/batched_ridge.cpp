// CPU driver: cuts the batch into tiles of lanes, the tiles into at most 64 tasks (by size alone), and gives every
// task its scratch.
#include "platonic/batched_ridge.h"

#include <algorithm>
#include <memory>
#include <new>

#include "common/parallel.h"
#include "platonic/batched_ridge_simd.h"

namespace platonic {
namespace {

struct AlignedFree {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

template <class Systems>
void solve_tiles(const Systems& systems, bool single, int64_t scratch_bytes, const Launch& on) {
    const int64_t lanes = PLATONIC_DISPATCH(ridge_lanes(single));
    const int64_t tiles = (systems.batch + lanes - 1) / lanes;
    const int64_t tasks = std::min<int64_t>(tiles, 64);
    parallel_for(tasks, on.threads, [&](int64_t task) {
        const std::unique_ptr<void, AlignedFree> scratch(
            ::operator new(static_cast<size_t>(scratch_bytes), std::align_val_t(64)));
        PLATONIC_DISPATCH(ridge_tiles(systems, tiles * task / tasks, tiles * (task + 1) / tasks, scratch.get()));
    });
}

template <class T>
void solve(const GramSystems<T>& s, const Launch& on) {
    solve_tiles(s, sizeof(T) == 4, PLATONIC_DISPATCH(gram_scratch(s.p, s.r, s.grid)), on);
}

template <class T>
void solve(const DataSystems<T>& s, const Launch& on) {
    const int64_t bytes = PLATONIC_DISPATCH(data_scratch(s.m, s.p, s.r, s.grid, s.intercepts != nullptr));
    solve_tiles(s, false, bytes, on);
}

}  // namespace

namespace cpu {
void batched_ridge(const GramSystems<float>& s, const Launch& on) { solve(s, on); }
void batched_ridge(const GramSystems<double>& s, const Launch& on) { solve(s, on); }
void batched_ridge(const DataSystems<float>& s, const Launch& on) { solve(s, on); }
void batched_ridge(const DataSystems<double>& s, const Launch& on) { solve(s, on); }
}  // namespace cpu

}  // namespace platonic
