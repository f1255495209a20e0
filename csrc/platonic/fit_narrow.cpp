// fit_narrow on the CPU. A layer is: form every try's W from the current statistics (one thread, no rows touched),
// one sweep over the rows that gathers the sums of every try (tasks of panels, cut by m alone), solve every try's
// read-out from its sums (one thread), keep the best. With one try the sweep writes the new representation at once;
// with several, the winner is applied again at the start of the next sweep, while a chunk of rows is in the cache:
// that costs 1 / n_tries of a sweep and no memory.
#include "platonic/fit_narrow.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "common/parallel.h"
#include "platonic/fit_narrow_math.h"
#include "platonic/fit_narrow_simd.h"

namespace platonic {
namespace cpu {
namespace {

using narrow::Candidate;
using narrow::Stats;

constexpr int64_t max_tasks = 64;

struct FreeAligned {
    void operator()(double* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<double[], FreeAligned>;

Buffer make_buffer(int64_t size) {
    return Buffer(
        static_cast<double*>(::operator new[](sizeof(double) * static_cast<size_t>(size), std::align_val_t(64))));
}

// The tries of one layer: their maps, pilots, statistics.
struct Tries {
    int64_t candidate_stride, pilot_stride, stats_stride;
    Buffer candidates, pilots, stats;

    Tries(int64_t width, int64_t k, int64_t tries)
        : candidate_stride(narrow::candidate_size(width, width)),
          pilot_stride(width * narrow_pilot),
          stats_stride(narrow::stats_size(width, k)),
          candidates(make_buffer(tries * candidate_stride)),
          pilots(make_buffer(tries * pilot_stride)),
          stats(make_buffer(tries * stats_stride)) {}

    Candidate candidate(int64_t t, int64_t h_in, int64_t h_out) {
        return narrow::candidate_at(candidates.get() + t * candidate_stride, h_in, h_out);
    }
    double* pilot(int64_t t) { return pilots.get() + t * pilot_stride; }
    Stats stats_of(int64_t t, int64_t h) { return narrow::stats_at(stats.get() + t * stats_stride, h); }
};

class Fit {
public:
    Fit(const FitNarrow& args, int threads)
        : a_(args),
          threads_(threads),
          k_(static_cast<int>(args.k)),
          panels_(narrow_panels(args.m)),
          chunks_((panels_ + narrow_chunk - 1) / narrow_chunk),
          tasks_(std::min(chunks_, max_tasks)),
          now_(args.width_max, args.k, args.n_tries),
          next_(args.width_max, args.k, args.n_tries),
          sums_size_(narrow::sums_size(args.width_max, args.k)),
          sums_(make_buffer((tasks_ + 1) * args.n_tries * sums_size_)),
          work_(make_buffer(std::max(narrow::solve_work_size(args.width_max, args.k),
                                     narrow::form_work_size(args.width_max, args.width_max)))),
          maps_(static_cast<size_t>(args.n_tries)) {}

    void run() {
        *a_.status = -1;
        if (!begin()) return;
        const double* normals = a_.normals;
        double *weights = a_.weights, *biases = a_.biases;
        for (int64_t i = 0; i < a_.layers; ++i) {
            const int64_t h_in = a_.widths[i], h_out = a_.widths[i + 1];
            form_tries(h_in, h_out, normals);
            sweep(static_cast<int>(h_out), a_.n_tries);
            for (int64_t t = 0; t < a_.n_tries; ++t) solve(t, h_out, next_.candidate(t, h_in, h_out).shift);
            if (!keep_best(i, weights, biases)) return;
            normals += a_.n_tries * (1 + h_in + k_) * h_out;
            weights += h_in * h_out;
            biases += h_out;
        }
        finish();
    }

private:
    // The statistics and pilot of the representation handed in, as try 0 of `now`.
    bool begin() {
        const int64_t h = a_.widths[0], rows = narrow::pilot_rows(a_.m);
        shift_ = a_.shift;
        double* pilot = now_.pilot(0);
        std::fill(pilot, pilot + h * narrow_pilot, 0.0);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = narrow::pilot_row(r, a_.m);
            const double* panel = a_.z + row / narrow_panel * panel_stride();
            for (int64_t j = 0; j < h; ++j) pilot[j * narrow_pilot + r] = panel[j * narrow_panel + row % narrow_panel];
        }
        sweep(static_cast<int>(h), 0);
        solve(0, h, shift_);
        std::swap(now_.stats, next_.stats);
        a_.lsd[0] = *now_.stats_of(0, h).lsd;
        a_.jitter[0] = *now_.stats_of(0, h).jitter;
        if (!narrow::finite(a_.lsd[0])) *a_.status = 0;
        return *a_.status < 0;
    }

    void form_tries(int64_t h_in, int64_t h_out, const double* normals) {
        const Stats stats = now_.stats_of(best_, h_in);
        for (int64_t t = 0; t < a_.n_tries; ++t) {
            const Candidate c = next_.candidate(t, h_in, h_out);
            const double* draw = normals + t * (1 + h_in + k_) * h_out;
            PLATONIC_DISPATCH(narrow_form(static_cast<int>(h_in), k_, static_cast<int>(h_out), a_.rule, stats,
                                          a_.y_stats, weight_sum(), draw, shift_, c, work_.get()));
            maps_[static_cast<size_t>(t)] = map_of(c, h_in, h_out);
            PLATONIC_DISPATCH(narrow_advance_pilot(maps_[static_cast<size_t>(t)], narrow::pilot_rows(a_.m),
                                                   now_.pilot(best_), next_.pilot(t), c.shift));
        }
    }

    // Sums of `tries` maps (or, with none, of the representation itself, which has h columns), reduced in task order
    // into the last slot of sums_.
    void sweep(int h, int64_t tries) {
        const bool advance = tries > 1 && pending_;
        const NarrowSweep s = make_sweep(advance, static_cast<int>(tries), h);
        const int64_t count = std::max<int64_t>(tries, 1), size = narrow::sums_size(h, k_) * count;
        const int64_t wide = advance ? std::max<int64_t>(h, winner_.h_out) : h;
        parallel_for(tasks_, threads_, [&](int64_t task) {
            const Buffer work = make_buffer(PLATONIC_DISPATCH(narrow_sweep_work(wide, k_)));
            PLATONIC_DISPATCH(narrow_sweep(s, first_panel(task), first_panel(task + 1), sums_of(task), work.get()));
        });
        double* total = sums_of(tasks_);
        std::copy(sums_of(0), sums_of(0) + size, total);
        for (int64_t task = 1; task < tasks_; ++task) {
            const double* part = sums_of(task);
            for (int64_t e = 0; e < size; ++e) total[e] += part[e];
        }
    }

    void solve(int64_t t, int64_t h, const double* shift) {
        const double* sums = sums_of(tasks_) + t * narrow::sums_size(h, k_);
        PLATONIC_DISPATCH(narrow_solve(static_cast<int>(h), k_, sums, shift, weight_sum(), a_.y_stats[k_], a_.rule,
                                       next_.stats_of(t, h), work_.get()));
    }

    // Makes the try with the lowest finite LSD the current representation and writes the layer's outputs.
    bool keep_best(int64_t layer, double* weights, double* biases) {
        const int64_t h_in = a_.widths[layer], h_out = a_.widths[layer + 1];
        best_ = -1;
        for (int64_t t = 0; t < a_.n_tries; ++t) {
            const double lsd = *next_.stats_of(t, h_out).lsd;
            if (narrow::finite(lsd) && (best_ < 0 || lsd < a_.lsd[layer + 1])) {
                best_ = t;
                a_.lsd[layer + 1] = lsd;
            }
        }
        if (best_ < 0) {
            *a_.status = layer + 1;
            return false;
        }
        std::swap(now_, next_);
        const Candidate c = now_.candidate(best_, h_in, h_out);
        std::copy(c.weights, c.weights + h_in * h_out, weights);
        std::copy(c.bias, c.bias + h_out, biases);
        a_.jitter[layer + 1] = *now_.stats_of(best_, h_out).jitter;
        a_.winner[layer] = best_;
        shift_ = c.shift;
        winner_ = map_of(c, h_in, h_out);
        pending_ = a_.n_tries > 1;
        return true;
    }

    void finish() {
        if (pending_) {
            const NarrowSweep s = make_sweep(true, 0, 0);
            parallel_for(tasks_, threads_, [&](int64_t task) {
                const Buffer work = make_buffer(PLATONIC_DISPATCH(narrow_sweep_work(winner_.h_out, k_)));
                PLATONIC_DISPATCH(narrow_advance(s, first_panel(task), first_panel(task + 1), work.get()));
            });
        }
        const int64_t h = a_.widths[a_.layers];
        const Stats stats = now_.stats_of(best_, h);
        if (shift_ != a_.shift) std::copy(shift_, shift_ + h, a_.shift);
        narrow::write_readout(narrow::OneThread{}, static_cast<int>(h), k_, stats, a_.y_stats, a_.readout);
    }

    NarrowSweep make_sweep(bool advance, int tries, int h) const {
        return {a_.m,         panel_stride(), k_, a_.weighted,    a_.z, a_.targets, advance ? &winner_ : nullptr,
                maps_.data(), tries,          h,  a_.n_tries == 1};
    }
    NarrowMap map_of(const Candidate& c, int64_t h_in, int64_t h_out) const {
        return {static_cast<int>(h_in), static_cast<int>(h_out), c.weights, c.bias_shifted, c.shift, a_.activation};
    }
    int64_t panel_stride() const { return a_.width_max * narrow_panel; }
    int64_t first_panel(int64_t task) const { return std::min(panels_, task * chunks_ / tasks_ * narrow_chunk); }
    double weight_sum() const { return a_.y_stats[k_ + 1]; }
    double* sums_of(int64_t task) { return sums_.get() + task * a_.n_tries * sums_size_; }

    const FitNarrow& a_;
    const int threads_, k_;
    const int64_t panels_, chunks_, tasks_;
    Tries now_, next_;
    const int64_t sums_size_;
    Buffer sums_, work_;
    std::vector<NarrowMap> maps_;
    const double* shift_ = nullptr;  // of the current representation
    NarrowMap winner_{};             // what made it, from the representation in z if pending_
    bool pending_ = false;
    int64_t best_ = 0;
};

}  // namespace

void fit_narrow(const FitNarrow& args, const Launch& on) { Fit(args, on.threads).run(); }

}  // namespace cpu
}  // namespace platonic
