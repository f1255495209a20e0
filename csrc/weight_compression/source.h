// What symbols are made from: the values of a tensor and the quantiser, or symbols themselves.
#pragma once

#include <cstdint>

#include "weight_compression/quantizer.h"

namespace platonic {

// The numbers are those of the payload's header; see FORMAT.md.
enum class DType : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

inline int64_t item_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

struct Values {
    DType dtype;
    const void* data;
    int64_t n;
};

struct Quantization {
    int64_t levels;
    Quantizer<float> single;  // dtypes but float64
    Quantizer<double> dual;   // float64
};

struct Dequantization {
    Dequantizer<float> single;
    Dequantizer<double> dual;
};

inline Quantization make_quantization(DType dtype, double lo, double hi, int64_t levels) {
    Quantization z{levels, {1, 0, 0}, {1, 0, 0}};
    if (dtype == DType::float64)
        z.dual = make_quantizer<double>(lo, hi, levels);
    else
        z.single = make_quantizer<float>(lo, hi, levels);
    return z;
}

inline Dequantization make_dequantization(DType dtype, double lo, double hi, int64_t levels) {
    Dequantization z{{0, 0, 1}, {0, 0, 1}};
    if (dtype == DType::float64)
        z.dual = make_dequantizer<double>(lo, hi, levels);
    else
        z.single = make_dequantizer<float>(lo, hi, levels);
    return z;
}

// What is done with decoded values: out = value, or out = out + scale * value, in the arithmetic of the dtype (float
// for 16-bit types) with every operation rounded on its own and the sum rounded to the dtype.
struct Target {
    DType dtype;
    void* data;
    bool accumulate;
    double scale;
};

}  // namespace platonic
