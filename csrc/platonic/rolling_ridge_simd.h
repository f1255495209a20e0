// What rolling_ridge.cpp asks of rolling_ridge_simd.cpp: tiles of rolling_lanes segments.
#pragma once

#include "common/cpu.h"
#include "platonic/rolling_ridge.h"

namespace platonic {

PLATONIC_FOR_EACH_ISA(int rolling_lanes();
                      // Bytes of scratch, to be aligned to 64.
                      int64_t rolling_scratch(int64_t p, int64_t r, bool constant);
                      void rolling_tile(const RollingRidge<float>& task, int64_t tile, void* scratch);
                      void rolling_tile(const RollingRidge<double>& task, int64_t tile, void* scratch);)

}  // namespace platonic
