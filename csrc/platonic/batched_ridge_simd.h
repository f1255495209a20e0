// What batched_ridge.cpp asks of batched_ridge_simd.cpp: tiles of ridge_lanes systems, system i in tile i / lanes.
#pragma once

#include "common/cpu.h"
#include "platonic/batched_ridge.h"

namespace platonic {

PLATONIC_FOR_EACH_ISA(
    // Systems in a tile when computed in float or in double.
    int ridge_lanes(bool single);
    // Bytes of scratch, to be aligned to 64.
    int64_t gram_scratch(int64_t p, int64_t r, int64_t grid);
    int64_t data_scratch(int64_t m, int64_t p, int64_t r, int64_t grid, bool constant);
    void ridge_tiles(const GramSystems<float>& s, int64_t first_tile, int64_t last_tile, void* scratch);
    void ridge_tiles(const GramSystems<double>& s, int64_t first_tile, int64_t last_tile, void* scratch);
    void ridge_tiles(const DataSystems<float>& s, int64_t first_tile, int64_t last_tile, void* scratch);
    void ridge_tiles(const DataSystems<double>& s, int64_t first_tile, int64_t last_tile, void* scratch);)

}  // namespace platonic
