// fit_narrow on CUDA: two launches a layer, nothing else on the stream between the first layer and the last.
//
//   sweep_rows   grid (tries, row blocks). Takes its rows through the winner of the layer before (try 0 writes them
//                down), then through its try, and adds up the try's sums. The last block of a try to finish reduces
//                the partial sums in block order and solves the read-out: tries are solved side by side.
//   choose_form  grid (tries). Every block picks the best try (the same one: they compare the same numbers), forms
//                its own try of the next layer and its shift; block 0 writes the layer's outputs.
//
// Rows are swept 32 at a time, columns in shared memory with one double of padding against bank conflicts. Thin
// layers leave the device mostly idle: latency, not throughput, sets the pace, so one block does one round of rows
// where there are few, and everything small happens in blocks that run at once.
#include "common/cuda_utils.cuh"
#include "platonic/fit_narrow.h"
#include "platonic/fit_narrow_math.h"

namespace platonic {
namespace cuda {
namespace {

using narrow::Candidate;
using narrow::Stats;

constexpr int threads = 256;
constexpr int round_rows = 32;         // rows of a round: one per lane
constexpr int pitch = round_rows + 1;  // doubles between columns in shared memory
constexpr int max_columns = narrow_max_width + 1;
constexpr int pilot_pitch = narrow_pilot + 1;
constexpr int64_t max_blocks = 128;  // row blocks; more would make the reduction longer than the sweep
constexpr int shared_size = 2 * max_columns * pitch;
static_assert(shared_size >= narrow_max_width * pilot_pitch, "choose_form keeps a pilot in shared memory");
static_assert(shared_size >= narrow_max_width * (narrow_max_width + 2), "and form_candidate's work");

struct Block {
    int x, y;
    static constexpr int nx = round_rows, ny = threads / round_rows;
    __device__ Block() : x(threadIdx.x % nx), y(threadIdx.x / nx) {}
    __device__ __forceinline__ void sync() const { __syncthreads(); }
};

// Scratch, in doubles. Everything that one layer writes while the layer before is read comes twice.
struct Layout {
    int64_t rounds, blocks, slots, candidate, pilot, stats, sums, work, z;
    int64_t counters, best, candidates, pilots, all_stats, all_sums, all_work, partials, second_z, size;

    Layout(int64_t m, int64_t k, int64_t width, int64_t tries)
        : rounds(narrow_panels(m) * (narrow_panel / round_rows)),
          blocks(rounds < max_blocks ? rounds : max_blocks),
          candidate(narrow::candidate_size(width, width)),
          pilot(width * narrow_pilot),
          stats(narrow::stats_size(width, k)),
          sums(narrow::sums_size(width, k)),
          work(narrow::solve_work_size(width, k)),
          z(narrow_panels(m) * width * narrow_panel) {
        slots = sums > threads ? sums : threads;
        counters = 0;  // tries ints, in as many doubles
        best = counters + tries;
        candidates = best + 2;
        pilots = candidates + 2 * tries * candidate;
        all_stats = pilots + 2 * tries * pilot;
        all_sums = all_stats + 2 * tries * stats;
        all_work = all_sums + tries * sums;
        partials = all_work + tries * work;
        second_z = partials + tries * blocks * slots;
        size = second_z + z;
    }
};

// One call's arrays and options, as every kernel gets them.
struct Device {
    FitNarrow a;
    Layout at;

    __device__ int* counter(int64_t t) const { return reinterpret_cast<int*>(a.scratch + at.counters) + t; }
    __device__ int64_t* best(int side) const { return reinterpret_cast<int64_t*>(a.scratch + at.best) + side; }
    __device__ Candidate candidate(int side, int64_t t, int h_in, int h_out) const {
        return narrow::candidate_at(a.scratch + at.candidates + (side * a.n_tries + t) * at.candidate, h_in, h_out);
    }
    __device__ double* pilot(int side, int64_t t) const {
        return a.scratch + at.pilots + (side * a.n_tries + t) * at.pilot;
    }
    __device__ Stats stats(int side, int64_t t, int h) const {
        return narrow::stats_at(a.scratch + at.all_stats + (side * a.n_tries + t) * at.stats, h);
    }
    __device__ double* z(int which) const { return which == 0 ? a.z : a.scratch + at.second_z; }
};

// A layer's place: representation `index` (0: handed in) of h columns, made from h_before columns, which were made
// from h_earlier. side = index % 2 is where its candidates, pilots and statistics lie.
struct Place {
    int64_t index;
    int h_earlier, h_before, h;
    __device__ int side() const { return static_cast<int>(index & 1); }
};

__device__ void load_columns(const Block& team, const double* from, int columns, double* to) {
    for (int j = team.y; j < columns; j += Block::ny) to[j * pitch + team.x] = from[j * narrow_panel + team.x];
    __syncthreads();
}

__device__ void store_columns(const Block& team, const double* from, int columns, double* to) {
    for (int j = team.y; j < columns; j += Block::ny) to[j * narrow_panel + team.x] = from[j * pitch + team.x];
}

// A round of rows through a layer, in shared memory; a row beyond the data becomes 0.
__device__ void apply_layer(const Block& team, const Candidate& layer, Activation activation, int h_in, int h_out,
                            bool inside, const double* from, double* to) {
    for (int j = team.y; j < h_out; j += Block::ny) {
        double total = layer.bias_shifted[j];
        for (int i = 0; i < h_in; ++i) total += from[i * pitch + team.x] * layer.weights[i * h_out + j];
        to[j * pitch + team.x] = inside ? activate(activation, total) - layer.shift[j] : 0.0;
    }
    __syncthreads();
}

// Adds a round's part of the sums (narrow::sums_size entries; below the diagonal nothing) to this block's partial
// sums. Where there are fewer entries than threads, several threads share an entry, each with its slice of the rows.
__device__ void add_round(int h, int k, bool first, const double* z, const double* targets, double* partial) {
    const int columns = h + 1 + k, entries = h * columns;
    const int slices = entries < threads ? threads / entries : 1;
    for (int slot = threadIdx.x; slot < entries * slices; slot += threads) {
        const int entry = slot % entries, i = entry / columns, j = entry % columns;
        if (j < i) continue;
        const double* left = z + i * pitch;
        const double* right = j < h ? z + j * pitch : targets + (j - h) * pitch;
        double total = first ? 0.0 : partial[slot];
        for (int r = slot / entries; r < round_rows; r += slices)
            total += left[r] * right[r] * (j < h ? targets[r] : 1.0);
        partial[slot] = total;
    }
    __syncthreads();
}

// sums[entry] over blocks and slices, in that order. The partial sums were written by other multiprocessors in this
// launch: __ldcg passes by this one's first-level cache.
__device__ void reduce_partials(const Device& d, int64_t t, int h, double* sums) {
    const int entries = h * (h + 1 + static_cast<int>(d.a.k));
    const int slices = entries < threads ? threads / entries : 1;
    for (int entry = threadIdx.x; entry < entries; entry += threads) {
        const double* from = d.a.scratch + d.at.partials + t * d.at.blocks * d.at.slots + entry;
        double total = 0.0;
        if (entry % (h + 1 + static_cast<int>(d.a.k)) >= entry / (h + 1 + static_cast<int>(d.a.k))) {
#pragma unroll 8
            for (int64_t block = 0; block < d.at.blocks; ++block)
                for (int slice = 0; slice < slices; ++slice)
                    total += __ldcg(from + block * d.at.slots + slice * entries);
        }
        sums[entry] = total;
    }
    __syncthreads();
}

// True in all threads of the last block of try t to get here; what the others wrote before is then visible.
__device__ bool last_block(const Device& d, int64_t t) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(d.counter(t), 1) == static_cast<int>(gridDim.y) - 1;
        if (last) *d.counter(t) = 0;  // for the next launch
    }
    __syncthreads();
    __threadfence();
    return last;
}

// z_from: which of the two z holds the representation that the latest completed advance wrote. Where `advance`, rows
// first go through the winner that made representation index - 1, and try 0 writes them to the other z.
__global__ void __launch_bounds__(threads) sweep_rows(Device d, Place p, int z_from, bool advance) {
    __shared__ double shared[shared_size];
    const Block team;
    const int64_t t = blockIdx.x;
    const int k = static_cast<int>(d.a.k);
    double* partial = d.a.scratch + d.at.partials + (t * d.at.blocks + blockIdx.y) * d.at.slots;
    const Candidate mine = d.candidate(p.side(), t, p.h_before, p.h);
    for (int64_t round = blockIdx.y; round < d.at.rounds; round += gridDim.y) {
        const int64_t panel = round / (narrow_panel / round_rows);
        const int row = static_cast<int>(round % (narrow_panel / round_rows)) * round_rows;
        const int64_t place = panel * d.a.width_max * narrow_panel + row;
        const bool inside = panel * narrow_panel + row + team.x < d.a.m;
        double *now = shared, *other = shared + max_columns * pitch;
        if (p.index == 0) {
            load_columns(team, d.z(z_from) + place, p.h, now);
        } else {
            if (advance) {
                const Candidate winner = d.candidate(1 - p.side(), *d.best(1 - p.side()), p.h_earlier, p.h_before);
                load_columns(team, d.z(z_from) + place, p.h_earlier, other);
                apply_layer(team, winner, d.a.activation, p.h_earlier, p.h_before, inside, other, now);
                if (t == 0) store_columns(team, now, p.h_before, d.z(1 - z_from) + place);
            } else {
                load_columns(team, d.z(z_from) + place, p.h_before, now);
            }
            apply_layer(team, mine, d.a.activation, p.h_before, p.h, inside, now, other);
            double* swap = now;
            now = other;
            other = swap;
        }
        load_columns(team, d.a.targets + panel * (k + 1) * narrow_panel + row, k + 1, other);
        add_round(p.h, k, round == blockIdx.y, now, other, partial);
    }
    if (!last_block(d, t)) return;
    double* sums = d.a.scratch + d.at.all_sums + t * d.at.sums;
    reduce_partials(d, t, p.h, sums);
    double* work =
        narrow::solve_work_size(p.h, k) <= shared_size ? shared : d.a.scratch + d.at.all_work + t * d.at.work;
    narrow::solve_readout(team, p.h, k, sums, p.index == 0 ? d.a.shift : mine.shift, d.a.y_stats[k + 1], d.a.y_stats[k],
                          d.a.rule, d.stats(p.side(), t, p.h), work);
}

// The try with the lowest finite LSD among `tries` of the representation at p, or -1.
__device__ int64_t best_try(const Device& d, const Place& p, int64_t tries) {
    int64_t best = -1;
    double lowest = 0.0;
    for (int64_t t = 0; t < tries; ++t) {
        const double lsd = *d.stats(p.side(), t, p.h).lsd;
        if (narrow::finite(lsd) && (best < 0 || lsd < lowest)) {
            best = t;
            lowest = lsd;
        }
    }
    return best;
}

// What layer p.index - 1 (counted from 0) gives: its W and b lie at `weights` and `biases`.
__device__ void write_outputs(const Device& d, const Place& p, int64_t best, bool found, double* weights,
                              double* biases) {
    const Stats stats = d.stats(p.side(), best, p.h);
    if (threadIdx.x == 0) {
        *d.best(p.side()) = best;
        d.a.lsd[p.index] = *stats.lsd;
        d.a.jitter[p.index] = *stats.jitter;
        if (p.index > 0) d.a.winner[p.index - 1] = best;
        if (p.index == 0) *d.a.status = -1;
        if (!found && *d.a.status < 0) *d.a.status = p.index;
    }
    if (p.index == 0) return;
    const Candidate winner = d.candidate(p.side(), best, p.h_before, p.h);
    for (int e = threadIdx.x; e < p.h_before * p.h; e += threads) weights[e] = winner.weights[e];
    for (int j = threadIdx.x; j < p.h; j += threads) biases[j] = winner.bias[j];
}

// The pilot of a try: the winner's pilot through the try's layer, whose shift becomes the mean.
__device__ void map_pilot(const Device& d, const Block& team, const Candidate& layer, int h_in, int h_out,
                          const double* from, double* shared, double* to) {
    const int rows = static_cast<int>(narrow::pilot_rows(d.a.m));
    for (int j = team.y; j < h_out; j += Block::ny)
        for (int r = team.x; r < rows; r += Block::nx) {
            double total = layer.bias_shifted[j];
            for (int i = 0; i < h_in; ++i) total += from[i * narrow_pilot + r] * layer.weights[i * h_out + j];
            shared[j * pilot_pitch + r] = activate(d.a.activation, total);
        }
    __syncthreads();
    for (int j = threadIdx.x; j < h_out; j += threads) {
        double total = 0.0;
        for (int r = 0; r < rows; ++r) total += shared[j * pilot_pitch + r];
        layer.shift[j] = total / rows;
    }
    __syncthreads();
    for (int j = team.y; j < h_out; j += Block::ny)
        for (int r = team.x; r < rows; r += Block::nx)
            to[j * narrow_pilot + r] = shared[j * pilot_pitch + r] - layer.shift[j];
}

// p: the representation just swept, by `tries` tries. h_next: columns after the next layer, 0 if there is none.
__global__ void __launch_bounds__(threads)
    choose_form(Device d, Place p, int64_t tries, int h_next, const double* normals, double* weights, double* biases) {
    __shared__ double shared[shared_size];
    const Block team;
    const int k = static_cast<int>(d.a.k);
    const int64_t found = best_try(d, p, tries), best = found < 0 ? 0 : found;
    if (blockIdx.x == 0) write_outputs(d, p, best, found >= 0, weights, biases);
    if (h_next == 0) return;
    const int64_t t = blockIdx.x;
    const Candidate next = d.candidate(1 - p.side(), t, p.h, h_next);
    const double* shift = p.index == 0 ? d.a.shift : d.candidate(p.side(), best, p.h_before, p.h).shift;
    narrow::form_candidate(team, p.h, k, h_next, d.a.rule, d.stats(p.side(), best, p.h), d.a.y_stats,
                           d.a.y_stats[k + 1], normals + t * (1 + p.h + k) * h_next, next, shared);
    narrow::shift_bias(team, p.h, h_next, shift, next);
    map_pilot(d, team, next, p.h, h_next, d.pilot(p.side(), best), shared, d.pilot(1 - p.side(), t));
}

// The pilot of the representation handed in, and every counter at 0.
__global__ void __launch_bounds__(threads) start(Device d, int h) {
    for (int64_t t = threadIdx.x; t < d.a.n_tries; t += threads) *d.counter(t) = 0;
    const int rows = static_cast<int>(narrow::pilot_rows(d.a.m));
    for (int e = threadIdx.x; e < h * rows; e += threads) {
        const int j = e / rows, r = e % rows;
        const int64_t row = narrow::pilot_row(r, d.a.m);
        d.pilot(0, 0)[j * narrow_pilot + r] =
            d.a.z[(row / narrow_panel * d.a.width_max + j) * narrow_panel + row % narrow_panel];
    }
}

// The last representation, at p, into a.z; its shift and read-out. A block reads a round before it writes it, and no
// other block touches it, so z_from may be a.z itself.
__global__ void __launch_bounds__(threads) finish(Device d, Place p, int z_from) {
    __shared__ double shared[shared_size];
    const Block team;
    const int64_t best = *d.best(p.side());
    const Candidate winner = d.candidate(p.side(), best, p.h_before, p.h);
    double* other = shared + max_columns * pitch;
    for (int64_t round = blockIdx.x; p.index > 0 && round < d.at.rounds; round += gridDim.x) {
        const int64_t panel = round / (narrow_panel / round_rows);
        const int row = static_cast<int>(round % (narrow_panel / round_rows)) * round_rows;
        const int64_t place = panel * d.a.width_max * narrow_panel + row;
        load_columns(team, d.z(z_from) + place, p.h_before, shared);
        apply_layer(team, winner, d.a.activation, p.h_before, p.h, panel * narrow_panel + row + team.x < d.a.m, shared,
                    other);
        store_columns(team, other, p.h, d.a.z + place);
        __syncthreads();
    }
    if (blockIdx.x != 0) return;
    if (p.index > 0)
        for (int j = threadIdx.x; j < p.h; j += threads) d.a.shift[j] = winner.shift[j];
    narrow::write_readout(team, p.h, static_cast<int>(d.a.k), d.stats(p.side(), best, p.h), d.a.y_stats, d.a.readout);
}

}  // namespace

int64_t narrow_scratch_size(int64_t m, int64_t k, int64_t width_max, int64_t n_tries) {
    return Layout(m, k, width_max, n_tries).size;
}

void fit_narrow(const FitNarrow& args, const Launch& on) {
    const DeviceGuard guard(on.device);
    const Device d{args, Layout(args.m, args.k, args.width_max, args.n_tries)};
    const auto width = [&](int64_t i) { return i < 0 ? 0 : static_cast<int>(args.widths[i]); };
    const auto row_blocks = static_cast<unsigned>(d.at.blocks), tries = static_cast<unsigned>(args.n_tries);
    const double* normals = args.normals;
    double *weights = args.weights, *biases = args.biases;
    int z_from = 0;

    launch("fit_narrow: start", start, 1, threads, on, d, width(0));
    for (int64_t i = 0; i <= args.layers; ++i) {
        const Place p{i, width(i - 2), width(i - 1), width(i)};
        const bool advance = i >= 2;
        launch("fit_narrow: sweep_rows", sweep_rows, {dim3(i == 0 ? 1 : tries, row_blocks), threads}, on, d, p, z_from,
               advance);
        if (advance) z_from = 1 - z_from;
        const int h_next = i < args.layers ? width(i + 1) : 0;
        launch("fit_narrow: choose_form", choose_form, h_next == 0 ? 1 : args.n_tries, threads, on, d, p,
               i == 0 ? 1 : args.n_tries, h_next, normals, weights, biases);
        normals += args.n_tries * (1 + p.h + args.k) * h_next;
        weights += p.h_before * p.h;
        biases += i > 0 ? p.h : 0;
    }
    const Place last{args.layers, width(args.layers - 2), width(args.layers - 1), width(args.layers)};
    launch("fit_narrow: finish", finish, row_blocks, threads, on, d, last, z_from);
}

}  // namespace cuda
}  // namespace platonic
