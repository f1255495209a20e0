// What the kernels of one call tell each other, in scratch.
#pragma once

#include "weight_compression/code_lengths.h"
#include "weight_compression/device_codec.h"
#include "weight_compression/device_common.cuh"
#include "weight_compression/levels.h"

namespace platonic {
namespace cuda {
namespace {

constexpr int single_threads = 1024;  // of kernels of one block
constexpr int grid_threads = 256;
constexpr int64_t max_grid = 2048;

struct Extent {
    double lo, hi;
    int finite;
};

// The search of device_ratio.cuh for the most levels that fit.
struct RatioSearch {
    int searching, tries;
    int64_t best, most;
    double bits, guess;  // that a value may take; log2 of the next try
};

struct PlanePlan {
    int hopeless;  // by the sample: stored as it is
    int kind, value, length_bytes;
    int64_t first;  // of its blocks
};

struct CompressPlan {
    int quantised;  // whether there are symbols: fixed or entropy may be chosen
    int refused;    // NaN or infinity: nothing is written
    int mode;
    int clamped;       // values beyond lo and hi get the outermost symbols, and are stored exactly
    int wide;          // a group has lo < hi
    int bits;          // of fixed symbols
    int length_bytes;  // of packed code lengths
    int again;         // whether blocks have to be measured again
    int differs;       // whether elements whose planes are looked at do
    int64_t levels, table, blocks, data, total;
    int64_t room;  // bytes that the blocks may take with the code of the sample; -1: it is that of all values
    double lo, hi, entropy;
    double whole_lo, whole_hi;   // with the values that lo and hi leave out
    unsigned long long widest;   // half the widest range of a group, as the integer of its bits
    unsigned long long escapes;  // of all blocks
    unsigned long long ends[2];  // the sample's lo and hi, as far as their digits are known
    int64_t ranks[2];            // theirs among the values that begin with these digits
    RatioSearch search;
    PlanePlan planes[max_planes];

    __device__ bool is(Mode m) const { return !refused && mode == static_cast<int>(m); }
    __device__ bool has_escapes() const { return clamped && (is(Mode::fixed) || is(Mode::entropy)); }
};

// What a code is made in and becomes.
struct CodeRoom {
    uint8_t *lengths, *packed;     // [levels], [levels / 2 + 1]
    uint32_t* codes;               // [levels]: code + 65536 * length
    unsigned long long* packages;  // [levels]
};

struct CompressScratch {
    CompressPlan* plan;
    unsigned long long *sample, *counts;  // [max_coded_levels], zeros at first; of planes, 256 each
    unsigned long long* sampled;          // of the sample in all levels; the same
    void* group_keys;                     // [groups][2]; see device_symbols.cuh; zeros at first
    Extent* extents;                      // [max_grid]
    CodeRoom code;                        // of max_coded_levels
    uint32_t* block_bytes;                // [blocks], without escapes
    uint32_t* escapes;                    // [blocks], where there may be any
    int64_t* offsets;                     // [blocks]
    void* symbols;                        // [n], uint8 up to 256 levels, else uint16
    int64_t zeroed, size;                 // bytes from `plan` that start as zeros; of everything

    CompressScratch(void* begin, const CompressCall& call) {
        Arena arena(begin);
        const DeviceArray& x = call.x;
        const bool quantised = call.way == Way::quantised;
        // Those of planes are not fewer than those of any other mode.
        const int64_t planes = unit_width(x.dtype, x.item) * block_count(unit_count(x.dtype, x.n));
        const int64_t raw = raw_blocks(x.n * x.item), coded = call.way == Way::planes ? planes : block_count(x.n);
        const int64_t blocks = raw > coded ? raw : coded, groups = group_count(x.n, call.group_size);
        plan = arena.take<CompressPlan>(1);
        sample = arena.take<unsigned long long>(max_coded_levels);
        counts = arena.take<unsigned long long>(max_coded_levels);
        sampled = arena.take<unsigned long long>(max_coded_levels);
        group_keys = arena.take<char>(2 * groups * (x.item == 8 ? 8 : 4));
        zeroed = arena.used() - static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin));
        extents = arena.take<Extent>(max_grid);
        code.lengths = arena.take<uint8_t>(max_coded_levels);
        code.packed = arena.take<uint8_t>(max_coded_levels / 2 + 1);
        code.codes = arena.take<uint32_t>(max_coded_levels);
        code.packages = arena.take<unsigned long long>(max_coded_levels);
        block_bytes = arena.take<uint32_t>(blocks);
        escapes = arena.take<uint32_t>(call.cut > 0 ? blocks : 0);
        offsets = arena.take<int64_t>(blocks);
        symbols = arena.take<uint16_t>(quantised ? x.n + 4 : 0);
        size = arena.used() - static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin));
    }

    // A part of the room and of the counts for each plane.
    __device__ CodeRoom code_of_plane(int p) const {
        return {code.lengths + 256 * p, code.packed + 256 * p, code.codes + 256 * p, code.packages};
    }
};
static_assert(256 * max_planes <= max_coded_levels / 2 + 1, "planes have room for their packed lengths");

// The sample that levels are chosen from: `size` values, in runs that begin `apart` from each other; 0: all values.
struct Sample {
    int64_t size, apart;

    Sample(int64_t n, double fraction) : size(n), apart(0) {
        if (n <= sample_everything) return;
        size = sample_runs(n, fraction) * sample_run;
        apart = n / (size / sample_run);
    }
    __device__ int64_t place(int64_t i) const { return apart == 0 ? i : i / sample_run * apart + i % sample_run; }
};

// Blocks for `work` items of a grid that strides: a few waves, and never so few that a block sees 2^31 items.
inline unsigned grid_of(int64_t work, int64_t each, int device) {
    const int64_t wanted = work / each + (work % each != 0), few = 8 * int64_t{multiprocessors(device)};
    int64_t blocks = wanted < few ? wanted : few;
    if (blocks > max_grid / 2) blocks = max_grid / 2;
    if (blocks < (work >> 31) + 1) blocks = (work >> 31) + 1;
    return static_cast<unsigned>(blocks);
}

}  // namespace
}  // namespace cuda
}  // namespace platonic
