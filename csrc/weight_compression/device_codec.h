// Whole payloads on a CUDA device: what codec.py, payload.py and the CPU's kernels do together, with the same bytes and
// the same values, in one call that only queues work on a stream. Nothing is read back: what a payload's size is and
// whether it could be decoded is written to memory of the device.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "weight_compression/payload_layout.h"

namespace platonic {

enum class LevelRule : int {
    entropy = 0,    // round(2^(H + value))
    given = 1,      // value
    max_error = 2,  // the fewest levels whose bins are at most 2 value wide
    ratio = 3       // many levels that leave at most 1 / value of the bytes
};

// What a tensor may become: mode raw, or constant if n = 1; or fixed or entropy, too; or, of n > 1, planes and
// constant.
enum class Way : int { exact = 0, quantised = 1, planes = 2 };

// An array of n elements whose dtype has the code `dtype` in payloads and `item` bytes.
struct DeviceArray {
    int dtype;
    int64_t item, n;
    void* data;
    Shape shape;
};

struct CompressCall {
    DeviceArray x;
    Way way;
    bool keep_nonfinite;  // store NaN and infinity in mode raw
    LevelRule rule;
    double value;
    int entropy_bits;  // M
    double sample_fraction;
    bool try_sample;     // the code of the sample, where sample_code_bits finds it good enough; of planes, a look at it
    int64_t group_size;  // values that have a range of their own; 0: all have one
    int64_t cut;         // values of the sample that its range leaves out at either end
    uint8_t* out;        // as many bytes as the payload in mode raw has
    int64_t* size;       // of the payload, or -1 if it was not written because of NaN or infinity
    void* scratch;       // compress_scratch_bytes, aligned to 16
};

struct DecompressCall {
    const uint8_t* payload;
    int64_t size;
    DeviceArray out;  // what the payload has to hold
    bool accumulate;
    double scale;
    bool check;
    int32_t* status;  // 0, or another number: the payload is not one, not one of `out`, or not whole
    void* scratch;    // decompress_scratch_bytes, aligned to 16
};

namespace cuda {

int64_t compress_scratch_bytes(const CompressCall& call);  // whatever its pointers are
void compress(const CompressCall& call, const Launch& on);

int64_t decompress_scratch_bytes(int dtype, int64_t item, int64_t n);
// Nothing outside of the payload is read, nothing outside of `out` written, whatever the bytes are. With `check`,
// nothing is written unless the header and all checksums are right.
void decompress(const DecompressCall& call, const Launch& on);

}  // namespace cuda
}  // namespace platonic
