// Decompressing a payload in one call, for the kinds that are made by default: one range, coded or of fixed bits. Of
// small tensors, reading the header in Python takes longer than decoding. What is not of these kinds, or has anything
// wrong with it, is left to payload.py, which says what.
#include <cstring>
#include <vector>

#include "common/exact_denormals.h"
#include "weight_compression/blocks.h"
#include "weight_compression/code_lengths.h"
#include "weight_compression/codec.h"
#include "weight_compression/crc32c.h"
#include "weight_compression/half.h"
#include "weight_compression/payload_layout.h"

namespace platonic {
namespace cpu {
namespace {

struct Quantised {
    Scheme scheme;
    int length_bytes;
};

bool is_value_of(DType dtype, double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    if (!(x - x == 0.0) || bits == uint64_t{1} << 63) return false;
    if (dtype == DType::float64) return true;
    const float single = static_cast<float>(x);
    if (!(single - single == 0.0f) || static_cast<double>(single) != x) return false;
    if (dtype == DType::float16) return half_to_float(float_to_half(single)) == single;
    return dtype != DType::bfloat16 || bfloat_to_float(float_to_bfloat(single)) == single;
}

bool parse_quantiser(const uint8_t* own, DType dtype, bool coded, Quantised* q) {
    Scheme& s = q->scheme;
    s.lo = get<double>(own);
    s.hi = get<double>(own + 8);
    s.levels = get<uint32_t>(own + 16);
    q->length_bytes = get<uint16_t>(own + 24);
    const float entropy = get<float>(own + 20);
    if (get<uint16_t>(own + 26) != 0 || !(entropy >= 0.0f && entropy <= 64.0f)) return false;
    if (!is_value_of(dtype, s.lo) || !is_value_of(dtype, s.hi) || !(s.lo < s.hi)) return false;
    if (s.levels < 2 || s.levels > (coded ? max_coded_levels : max_levels)) return false;
    return coded ? q->length_bytes <= s.levels / 2 + 1 : q->length_bytes == 0;
}

}  // namespace

bool decode_payload(const uint8_t* data, int64_t size, const Shape& shape, int64_t n, const Target& out, bool check,
                    const Launch& on) {
    const ExactDenormals exact;
    const int64_t own = own_begin(shape.dimensions);
    if (n == 0 || size < own + quantiser_bytes || get<uint32_t>(data) != payload_magic || data[4] != payload_version)
        return false;
    const bool coded = data[5] == static_cast<int>(Mode::entropy);
    if (!coded && data[5] != static_cast<int>(Mode::fixed)) return false;
    if (data[6] != static_cast<int>(out.dtype) || data[7] != shape.dimensions) return false;
    if (get<uint64_t>(data + 8) != static_cast<uint64_t>(size)) return false;
    for (int d = 0; d < shape.dimensions; ++d)
        if (get<int64_t>(data + start_bytes + 8 * d) != shape.sizes[d]) return false;
    Quantised q{};
    if (!parse_quantiser(data + own, out.dtype, coded, &q)) return false;
    const int64_t levels = q.scheme.levels, blocks = block_count(n);
    const int64_t table_at = own + quantiser_own(q.length_bytes, 0, 0);
    const int64_t begin = data_begin(shape.dimensions, table_at - own, blocks, false);
    if (begin > size || crc32c(0, data, begin - 4) != get<uint32_t>(data + begin - 4)) return false;
    const int bits = fixed_bits(levels);
    std::vector<BlockEntry> table(blocks);
    int64_t total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        table[b] = {get<uint32_t>(data + table_at + 8 * b), get<uint32_t>(data + table_at + 8 * b + 4)};
        const int64_t bytes = table[b].bytes;
        const bool right = coded ? bytes >= block_state_bytes && bytes <= max_block_bytes && bytes % 2 == 0
                                 : bytes == fixed_block_bytes(symbols_of_block(n, b), bits);
        if (!right) return false;
        total += bytes;
    }
    if (total != size - begin) return false;
    std::vector<uint8_t> lengths(coded ? levels : 0);
    if (coded && !unpack_lengths(data + own + quantiser_bytes, q.length_bytes, levels, lengths.data())) return false;
    const Coding coding{coded ? lengths.data() : nullptr, bits};
    const Blocks all{data + begin, size - begin, table.data(), nullptr};
    return decode_blocks(all, n, q.scheme, coding, out, check, on).status == DecodeStatus::ok;
}

}  // namespace cpu
}  // namespace platonic
