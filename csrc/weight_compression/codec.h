// Compressing and decompressing the blocks of one tensor on the CPU. The pipeline:
//
//   value_range [-> group_ranges | count_outside]       ranges, and the sample
//   symbol_counts of the sample | sample_counts         its entropy -> levels.h -> the levels
//   symbol_counts of the sample | of all -> code_lengths -> encode_blocks
//   decode_blocks
//
// and of planes of bytes, which hold values exactly: symbol_counts -> code_lengths -> encode_blocks or copy_plane for
// each plane, and decode_planes for all. Headers and block tables are laid out by weight_compression/payload.py;
// FORMAT.md has the whole format.
#pragma once

#include <cstdint>
#include <vector>

#include "common/launch.h"
#include "weight_compression/levels.h"
#include "weight_compression/quantize_simd.h"
#include "weight_compression/source.h"
#include "weight_compression/stream.h"

namespace platonic {

// Of a block in the payload's table.
struct BlockEntry {
    uint32_t bytes, checksum;
};

// How symbols are stored: by a canonical prefix code with these lengths, or, if lengths is null, with `bits` each.
struct Coding {
    const uint8_t* lengths;
    int bits;
};

// The blocks of a payload, one behind the other: the table's sizes add up to `size`. `escapes`, if not null, is the
// number of values at the end of every block that are stored exactly, as uint16 positions and the values.
struct Blocks {
    const uint8_t* data;
    int64_t size;
    const BlockEntry* table;
    const uint32_t* escapes;
};

enum class DecodeStatus : int { ok = 0, checksum = 1, malformed = 2 };

struct DecodeResult {
    DecodeStatus status;
    int64_t block;  // one that failed: the lowest of those that were looked at
};

// One plane of bytes: coded, or, without lengths, its bytes as they are, or, without blocks, `value` throughout.
struct PlaneBlocks {
    Blocks blocks;
    const uint8_t* lengths;
    uint8_t value;
};

struct Shape;  // payload_layout.h

namespace cpu {

// Values of the sample (see levels.h) of n.
inline int64_t sample_size(int64_t n, double fraction) {
    return n <= sample_everything ? n : sample_runs(n, fraction) * sample_run;
}

// Of all n >= 1 values. `sample`, if not null, gets the sample_size(n, fraction) values of the sample.
Range value_range(const Values& x, double fraction, void* sample, const Launch& on);

// ranges[2 g], ranges[2 g + 1], of the dtype of x: lo and hi of the group g of `size` values; the last may have fewer.
void group_ranges(const Values& x, int64_t size, void* ranges, const Launch& on);

// levels_of_error of n values' widest range.
int64_t levels_of_error(const Scheme& scheme, DType dtype, int64_t n, double max_error);

// Half a bin of the widest range.
double error_bound(const Scheme& scheme, DType dtype, int64_t n);

// How many values of each block are below lo or above hi.
void count_outside(const Values& x, double lo, double hi, uint32_t* counts, const Launch& on);

// Numbers of values of the sample by symbol, where those depend on where in x a value is.
void sample_counts(const Values& x, const Scheme& scheme, double fraction, int64_t* counts);

// Numbers of all values by symbol.
void symbol_counts(const Values& x, const Scheme& scheme, int64_t* counts, const Launch& on);

// Writes the blocks one behind the other and returns their bytes, or -1 if they are more than `room`, which has to be
// coded_bytes_bound(n, total bits) or, for fixed bits, fixed_bytes(n, bits), and those of the escapes. table has
// block_count(n) entries. `escapes` is what count_outside found, or null; the scheme clamps if it is not.
int64_t encode_blocks(const Values& x, const Scheme& scheme, const Coding& coding, const uint32_t* escapes,
                      uint8_t* out, int64_t room, BlockEntry* table, const Launch& on);

// The inverse into `out`, of n elements. With `check`, checksums are compared before a block is decoded, and before
// anything is added when accumulating.
DecodeResult decode_blocks(const Blocks& blocks, int64_t n, const Scheme& scheme, const Coding& coding,
                           const Target& out, bool check, const Launch& on);

// ---- whole payloads ----

// How a tensor whose quantiser has been chosen is stored: in which mode, and the header before its block table.
struct PayloadPlan {
    int mode;      // Mode of payload_layout.h: raw means that nothing else is smaller, and there is no more to the plan
    int64_t room;  // bytes that the payload may take
    Values x;
    Scheme scheme;
    const uint32_t* escapes;
    std::vector<uint8_t> prefix, lengths;  // no lengths: symbols of a fixed number of bits
};

// `entropy` is for the header; `escapes`, null or what count_outside found, take escape_bytes. With the values of a
// `sample` (else its n is 0), the code is made from those, and the plan is raw unless that suffices and a code is
// smaller than everything else. What the arguments point to has to outlive the plan.
PayloadPlan plan_payload(const Values& x, const Shape& shape, const Scheme& scheme, double entropy,
                         const uint32_t* escapes, int64_t escape_bytes, const Values& sample, double fraction,
                         const Launch& on);

// One range, and floor_bits + H bits of levels: H is the entropy of a sample (see levels.h) in 2^entropy_bits bins.
// Tensors of `sampled_from` values and more get the sample's code where that suffices.
struct ByEntropy {
    int entropy_bits;
    double floor_bits, fraction;
    int64_t sampled_from;
};

// From values to plan. Raw, too, for values that are all equal or not all finite. n >= 1.
PayloadPlan plan_by_entropy(const Values& x, const Shape& shape, const ByEntropy& by, const Launch& on);

// Returns the payload's bytes, or -1 if the plan's room does not suffice. What is left of the room becomes zeros.
int64_t write_payload(const PayloadPlan& plan, uint8_t* out, const Launch& on);

// The payloads of flat tensors, one behind the other, up to the first that is raw by such a plan, or for which its room
// or what is left of `room` does not suffice. Returns the bytes of those written.
std::vector<int64_t> write_payloads(const std::vector<Values>& tensors, const ByEntropy& by, uint8_t* out, int64_t room,
                                    const Launch& on);

// A whole payload of that shape, of n elements in all, if it is of a kind that is made by default; false if it is not,
// or if anything is wrong with it. What has been written by then is unspecified; nothing has been added before all was
// right that `check` compares.
bool decode_payload(const uint8_t* data, int64_t size, const Shape& shape, int64_t n, const Target& out, bool check,
                    const Launch& on);

struct FlatTarget {
    Target out;
    int64_t n, bytes;  // of its values, of its payload
};

// Payloads of flat tensors, one behind the other. Returns how many were decoded before the first of which
// decode_payload says false.
int64_t decode_payloads(const uint8_t* data, const std::vector<FlatTarget>& targets, bool check, const Launch& on);

// The bytes of one plane as they are, in blocks of block_symbols.
void copy_plane(const Values& x, const Plane& plane, uint8_t* out, BlockEntry* table, const Launch& on);

// n units of `width` bytes from their planes, the top first. The block of a result counts through all planes' tables.
DecodeResult decode_planes(const PlaneBlocks* planes, int64_t n, int width, bool rotate, void* out, bool check,
                           const Launch& on);

// out.data[i] = out.data[i] + out.scale * values[i], in the arithmetic of Target.
void add_values(const void* values, int64_t n, const Target& out, const Launch& on);

// Checksums of blocks of `block` bytes (the last may be shorter).
void checksum_blocks(const uint8_t* data, int64_t size, int64_t block, BlockEntry* table, const Launch& on);

}  // namespace cpu

// ---- symbols of a fixed number of bits: bit i * bits of a block begins its symbol i, least significant bit first ----

PLATONIC_HD int fixed_bits(int64_t levels) {
    int bits = 1;
    while ((int64_t{1} << bits) < levels) ++bits;
    return bits;
}
PLATONIC_HD int64_t fixed_block_bytes(int64_t n, int bits) { return (n * bits + 7) / 8; }
PLATONIC_HD int64_t fixed_bytes(int64_t n, int bits) {
    return n / block_symbols * fixed_block_bytes(block_symbols, bits) + fixed_block_bytes(n % block_symbols, bits);
}

// Bytes of a value that is stored exactly beside a block.
inline int64_t escape_bytes(DType dtype) { return 2 + item_bytes(dtype); }

}  // namespace platonic
