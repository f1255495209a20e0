// What the kernels of one call tell each other, in scratch.
#pragma once

#include "weight_compression/code_lengths.h"
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

struct CompressPlan {
    int quantised;  // whether there are symbols: fixed or entropy may be chosen
    int refused;    // NaN or infinity: nothing is written
    int mode;
    int bits;          // of fixed symbols
    int length_bytes;  // of packed code lengths
    int again;         // whether blocks have to be measured again
    int64_t levels, table, blocks, data, total;
    int64_t room;  // bytes that the blocks may take with the code of the sample; -1: it is that of all values
    double lo, hi, entropy;
    Quantizer<float> single;
    Quantizer<double> dual;

    __device__ bool is(Mode m) const { return !refused && mode == static_cast<int>(m); }
    template <class R>
    __device__ const Quantizer<R>& quantizer() const {
        if constexpr (sizeof(R) == 4)
            return single;
        else
            return dual;
    }
    template <class T>
    __device__ void set_quantizer(int64_t count) {
        if constexpr (sizeof(typename T::Real) == 4)
            single = make_quantizer<float>(lo, hi, count);
        else
            dual = make_quantizer<double>(lo, hi, count);
    }
};

struct CompressScratch {
    CompressPlan* plan;
    unsigned long long *sample, *counts;  // [max_coded_levels], zeros at first
    unsigned long long* sampled;          // of the sample in all levels; the same
    Extent* extents;                      // [max_grid]
    uint8_t *lengths, *packed;            // [max_coded_levels], [max_coded_levels / 2 + 1]
    uint32_t* codes;                      // [max_coded_levels]: code + 65536 * length
    unsigned long long* packages;         // [max_coded_levels]
    uint32_t* block_bytes;                // [blocks]
    int64_t* offsets;                     // [blocks]
    void* symbols;                        // [n], uint8 up to 256 levels, else uint16
    int64_t zeroed, size;                 // bytes from `plan` that start as zeros; of everything

    CompressScratch(void* begin, int64_t item, int64_t n) {
        Arena arena(begin);
        const int64_t raw = raw_blocks(n * item), blocks = raw > block_count(n) ? raw : block_count(n);
        plan = arena.take<CompressPlan>(1);
        sample = arena.take<unsigned long long>(max_coded_levels);
        counts = arena.take<unsigned long long>(max_coded_levels);
        sampled = arena.take<unsigned long long>(max_coded_levels);
        zeroed = arena.used() - static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin));
        extents = arena.take<Extent>(max_grid);
        lengths = arena.take<uint8_t>(max_coded_levels);
        packed = arena.take<uint8_t>(max_coded_levels / 2 + 1);
        codes = arena.take<uint32_t>(max_coded_levels);
        packages = arena.take<unsigned long long>(max_coded_levels);
        block_bytes = arena.take<uint32_t>(blocks);
        offsets = arena.take<int64_t>(blocks);
        symbols = arena.take<uint16_t>(n + 4);
        size = arena.used() - static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin));
    }
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
