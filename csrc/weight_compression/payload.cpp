// Whole payloads, header and blocks: of small tensors, putting a header together or taking it apart in Python takes
// longer than coding. Writing covers modes fixed and entropy; reading, of these, what is made by default: one range and
// nothing stored beside the symbols. What is of another kind, or has anything wrong with it, is left to payload.py,
// which says what.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "common/exact_denormals.h"
#include "common/half.h"
#include "weight_compression/blocks.h"
#include "weight_compression/code_lengths.h"
#include "weight_compression/codec.h"
#include "weight_compression/crc32c.h"
#include "weight_compression/levels.h"
#include "weight_compression/payload_layout.h"

namespace platonic {
namespace cpu {
namespace {

constexpr int total_at = 8;  // of the payload's size in its start

// Counts of all values, or of the sample's.
std::vector<int64_t> counts_of(const Values& x, const Scheme& scheme, const Values& sample, double fraction,
                               const Launch& on) {
    std::vector<int64_t> counts(scheme.levels);
    if (sample.n == 0)
        symbol_counts(x, scheme, counts.data(), on);
    else if (scheme.ranges)
        sample_counts(x, scheme, fraction, counts.data());  // a symbol depends on the group, that on the place
    else
        symbol_counts(sample, scheme, counts.data(), on);
    return counts;
}

// Bits of all values, or that they may take; -1 if there is no code or that of the sample is not good enough.
int64_t make_code(const std::vector<int64_t>& counts, int64_t sampled_of, uint8_t* lengths) {
    const int64_t levels = static_cast<int64_t>(counts.size());
    if (std::count_if(counts.begin(), counts.end(), [](int64_t count) { return count > 0; }) < 2) return -1;
    if (sampled_of > 0) return sample_code(counts.data(), levels, sampled_of, lengths);
    code_lengths(counts.data(), levels, lengths);
    int64_t bits = 0;
    for (int64_t s = 0; s < levels; ++s) bits += counts[s] * lengths[s];
    return bits;
}

template <class T>
void append(std::vector<uint8_t>& bytes, T value) {
    bytes.resize(bytes.size() + sizeof(T));
    put(&bytes[bytes.size() - sizeof(T)], value);
}

std::vector<uint8_t> make_prefix(Mode mode, const Values& x, const Shape& shape, const Scheme& scheme, double entropy,
                                 const std::vector<uint8_t>& packed) {
    std::vector<uint8_t> bytes;
    append(bytes, payload_magic);
    for (int field : {payload_version, static_cast<int>(mode), static_cast<int>(x.dtype), shape.dimensions})
        append(bytes, static_cast<uint8_t>(field));
    append(bytes, uint64_t{0});  // the size, later
    for (int d = 0; d < shape.dimensions; ++d) append(bytes, shape.sizes[d]);
    append(bytes, scheme.lo);
    append(bytes, scheme.hi);
    append(bytes, static_cast<uint32_t>(scheme.levels));
    append(bytes, static_cast<float>(entropy));
    append(bytes, static_cast<uint16_t>(packed.size()));
    append(bytes, static_cast<uint16_t>((scheme.ranges ? grouped_flag : 0) | (scheme.clamp ? escaped_flag : 0)));
    bytes.insert(bytes.end(), packed.begin(), packed.end());
    if (scheme.ranges) {
        append(bytes, scheme.group_size);
        const uint8_t* const ranges = static_cast<const uint8_t*>(scheme.ranges);
        bytes.insert(bytes.end(), ranges, ranges + 2 * item_bytes(x.dtype) * group_count(x.n, scheme.group_size));
    }
    return bytes;
}

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

PayloadPlan plan_payload(const Values& x, const Shape& shape, const Scheme& scheme, double entropy,
                         const uint32_t* escapes, int64_t escape_bytes, const Values& sample, double fraction,
                         const Launch& on) {
    const int64_t item = item_bytes(x.dtype), blocks = block_count(x.n), raw = x.n * item;
    const auto header = [&](int64_t length_bytes) {
        const int64_t groups = scheme.ranges ? group_count(x.n, scheme.group_size) : 0;
        return data_begin(shape.dimensions, quantiser_own(length_bytes, groups, item), blocks, scheme.clamp);
    };
    const PayloadPlan as_it_is{static_cast<int>(Mode::raw), 0, x, scheme, nullptr, {}, {}};
    const int64_t raw_room = data_begin(shape.dimensions, 0, raw_blocks(raw), false) + raw;
    const int64_t fixed_room = header(0) + fixed_bytes(x.n, fixed_bits(scheme.levels)) + escape_bytes;
    std::vector<uint8_t> lengths, packed;
    int64_t coded_room = INT64_MAX;
    if (scheme.levels <= max_coded_levels) {
        lengths.resize(scheme.levels);
        const int64_t bits =
            make_code(counts_of(x, scheme, sample, fraction, on), sample.n > 0 ? x.n : 0, lengths.data());
        if (bits >= 0) {
            packed.resize(scheme.levels / 2 + 1);
            packed.resize(pack_lengths(lengths.data(), scheme.levels, packed.data()));
            coded_room = header(packed.size()) + coded_bytes_bound(x.n, bits) + escape_bytes;
        }
    }
    // Of equal sizes, the simpler mode.
    const bool coded = coded_room < fixed_room && coded_room < raw_room;
    if (!coded && (sample.n > 0 || fixed_room >= raw_room)) return as_it_is;
    if (!coded) lengths.clear(), packed.clear();
    const Mode mode = coded ? Mode::entropy : Mode::fixed;
    return {static_cast<int>(mode),
            coded ? coded_room : fixed_room,
            x,
            scheme,
            escapes,
            make_prefix(mode, x, shape, scheme, entropy, packed),
            lengths};
}

PayloadPlan plan_by_entropy(const Values& x, const Shape& shape, const ByEntropy& by, const Launch& on) {
    const ExactDenormals exact;
    const int64_t size = sample_size(x.n, by.fraction);
    const std::unique_ptr<char[]> memory(new char[size * item_bytes(x.dtype)]);  // not cleared
    const Values sample{x.dtype, memory.get(), size}, all{x.dtype, nullptr, 0};
    const Range range = value_range(x, by.fraction, memory.get(), on);
    Scheme scheme{int64_t{1} << by.entropy_bits, range.lo, range.hi, 0, nullptr, false, {}};
    PayloadPlan plan{static_cast<int>(Mode::raw), 0, x, scheme, nullptr, {}, {}};
    if (!range.finite || !(range.lo < range.hi)) return plan;
    std::vector<int64_t> counts(scheme.levels);
    symbol_counts(sample, scheme, counts.data(), on);
    const double entropy = histogram_entropy(counts.data(), scheme.levels);
    scheme.levels = levels_of_bits(entropy + by.floor_bits);
    if (x.n >= by.sampled_from && scheme.levels <= max_coded_levels)
        plan = plan_payload(x, shape, scheme, entropy, nullptr, 0, sample, by.fraction, on);
    if (plan.mode == static_cast<int>(Mode::raw))
        plan = plan_payload(x, shape, scheme, entropy, nullptr, 0, all, by.fraction, on);
    return plan;
}

int64_t write_payload(const PayloadPlan& plan, uint8_t* out, const Launch& on) {
    const int64_t blocks = block_count(plan.x.n), row = entry_bytes(plan.escapes != nullptr);
    const int64_t prefix = static_cast<int64_t>(plan.prefix.size()), begin = prefix + row * blocks + 4;
    const Coding coding{plan.lengths.empty() ? nullptr : plan.lengths.data(), fixed_bits(plan.scheme.levels)};
    std::vector<BlockEntry> table(blocks);
    const int64_t size =
        encode_blocks(plan.x, plan.scheme, coding, plan.escapes, out + begin, plan.room - begin, table.data(), on);
    if (size < 0) return -1;
    memcpy(out, plan.prefix.data(), prefix);
    put(out + total_at, begin + size);
    for (int64_t b = 0; b < blocks; ++b) {
        uint8_t* const at = out + prefix + row * b;
        put(at, table[b].bytes);
        put(at + 4, table[b].checksum);
        if (plan.escapes) put(at + 8, plan.escapes[b]);
    }
    put(out + begin - 4, crc32c(0, out, begin - 4));
    memset(out + begin + size, 0, plan.room - begin - size);
    return begin + size;
}

std::vector<int64_t> write_payloads(const std::vector<Values>& tensors, const ByEntropy& by, uint8_t* out, int64_t room,
                                    const Launch& on) {
    std::vector<int64_t> sizes;
    for (const Values& x : tensors) {
        if (x.n == 0) break;
        const PayloadPlan plan = plan_by_entropy(x, {1, {x.n}}, by, on);
        if (plan.mode == static_cast<int>(Mode::raw) || plan.room > room) break;
        const int64_t size = write_payload(plan, out, on);
        if (size < 0) break;
        sizes.push_back(size);
        out += size;
        room -= size;
    }
    return sizes;
}

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

int64_t decode_payloads(const uint8_t* data, const std::vector<FlatTarget>& targets, bool check, const Launch& on) {
    int64_t done = 0;
    for (const FlatTarget& target : targets) {
        if (!decode_payload(data, target.bytes, {1, {target.n}}, target.n, target.out, check, on)) break;
        data += target.bytes;
        ++done;
    }
    return done;
}

}  // namespace cpu
}  // namespace platonic
