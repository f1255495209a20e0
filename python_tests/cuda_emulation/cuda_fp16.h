// CUDA's 16-bit numbers, as far as this project's kernels use them, for a C++ compiler; see cuda_runtime.h.
#pragma once

#include "common/half.h"

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __half2float(__half x) { return platonic::half_to_float(x.bits); }
inline __half __float2half_rn(float x) { return {platonic::float_to_half(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return platonic::bfloat_to_float(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {platonic::float_to_bfloat(x)}; }
