// The C++ decoder under AddressSanitizer and UndefinedBehaviorSanitizer, on bytes that no header has vouched for.
//
//   make fuzz                        builds with $(CXX) and runs 200,000 mutations of either kind
//   clang++ -fsanitize=fuzzer ...    with -DPLATONIC_LIBFUZZER: a libFuzzer target
//
// An input is taken apart into an alphabet, its code lengths, a number of values and their blocks; inputs of which that
// cannot be made are skipped. Block sizes are those that payload.py lets through and no others. Whole payloads go through
// decode_payload, half of them with the header's checksum made right again.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/cpu.h"
#include "weight_compression/code_lengths.h"
#include "weight_compression/codec.h"
#include "weight_compression/crc32c.h"
#include "weight_compression/payload_layout.h"

using namespace platonic;

static void decode(const uint8_t* data, size_t size, const char* isa) {
    if (size < 9) return;
    limit_isa(isa);
    const DType dtype = static_cast<DType>(data[2] % 4);
    const bool fixed = data[3] & 1, accumulate = data[3] & 2, escaped = data[3] & 4, grouped = data[3] & 8;
    const bool planes = data[3] & 16;
    const int64_t levels = planes ? 256 : 2 + (data[0] | data[1] << 8) % 600;
    const int64_t n = 1 + (data[4] | data[5] << 8 | (data[6] & 3) << 16);
    std::vector<uint8_t> lengths(levels);
    const int64_t packed = data[7];
    size_t at = 9 + packed;
    CanonicalCode code;
    if (!fixed && (size < at || !unpack_lengths(data + 9, packed, levels, lengths.data()) ||
                   !make_canonical(lengths.data(), levels, &code)))
        return;
    if (fixed) at = 9;
    // Exactly as long as the data, on the heap: whoever reads beyond is seen.
    const std::vector<uint8_t> bytes(data + at, data + size);
    const int64_t count = block_count(n), bits = fixed_bits(levels), beside = data[8];
    std::vector<BlockEntry> table(count);
    std::vector<uint32_t> escapes(count);
    int64_t left = static_cast<int64_t>(bytes.size());
    for (int64_t b = 0; b < count; ++b) {
        int64_t mine = b == count - 1 ? left : left / count / 2 * 2;
        const int64_t symbols = b == count - 1 ? n - b * block_symbols : block_symbols;
        if (escaped && !planes) escapes[b] = static_cast<uint32_t>(beside);
        const int64_t own = escapes[b] * escape_bytes(dtype);
        if (fixed) mine = (planes ? symbols : fixed_block_bytes(symbols, static_cast<int>(bits))) + own;
        if (mine > left || mine < own) return;
        if (!fixed && (mine - own < block_state_bytes || mine - own > max_block_bytes || (mine - own) % 2)) return;
        table[b] = {static_cast<uint32_t>(mine), 0};
        left -= mine;
    }
    if (left != 0) return;
    const Blocks blocks{bytes.data(), static_cast<int64_t>(bytes.size()), table.data(),
                        escaped ? escapes.data() : nullptr};
    const Launch on{-1, 1, nullptr};
    const uint8_t* code_of = fixed ? nullptr : lengths.data();
    if (planes) {
        const int width = 1 << data[2] % 4;
        std::vector<uint8_t> out(n * width);
        std::vector<PlaneBlocks> all(width, PlaneBlocks{{}, nullptr, 7});
        all[data[8] % width] = {{blocks.data, blocks.size, blocks.table, nullptr}, code_of, 0};
        cpu::decode_planes(all.data(), n, width, width > 1, out.data(), false, on);
        return;
    }
    std::vector<uint8_t> out(n * item_bytes(dtype));
    const Target target{dtype, out.data(), accumulate, 0.5};
    Scheme scheme{levels, -1.0, 2.0, 0, nullptr, escaped, {}};
    std::vector<uint8_t> ranges;
    if (grouped && !escaped) {
        scheme.group_size = 16 + data[8];
        // Ascending small numbers, as bits, of any of the types: some groups without width.
        ranges.resize((n / scheme.group_size + 1) * 2 * item_bytes(dtype));
        for (size_t i = 0; i < ranges.size(); ++i)
            if (i % item_bytes(dtype) == static_cast<size_t>(item_bytes(dtype)) - 1)
                ranges[i] = static_cast<uint8_t>(0x30 + (i / item_bytes(dtype)) % 2 * (bytes[i % bytes.size()] % 4));
        scheme.ranges = ranges.data();
    }
    cpu::decode_blocks(blocks, n, scheme, {code_of, static_cast<int>(bits)}, target, false, on);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    for (const char* isa : {"scalar", "avx2", "avx512"}) decode(data, size, isa);
    return 0;
}

#if !defined(PLATONIC_LIBFUZZER)

struct Payload {
    Shape shape;
    DType dtype;
    int64_t n;
    int64_t begin;  // of the blocks; the header's checksum lies before it
    std::vector<uint8_t> bytes;
};

static Payload seed_payload(unsigned kind) {
    const int64_t levels = kind % 3 == 0 ? 2 : kind % 3 == 1 ? 200 : 700, n = kind % 2 ? 40 : 9000;
    std::vector<float> x(n);
    for (float& value : x) value = static_cast<float>(rand() % 1000) / 1000.0f * (kind % 4 == 3 ? 0.01f : 1.0f);
    x[0] = 0.0f;
    x[1] = 1.0f;
    const Values values{DType::float32, x.data(), n};
    const Launch on{-1, 1, nullptr};
    const Shape shape{2, {2, n / 2}};
    const Scheme scheme{levels, 0.0, 1.0, 0, nullptr, false, {}};
    const cpu::PayloadPlan plan = cpu::plan_payload(values, shape, scheme, 3.0, nullptr, 0, {}, 1.0, on);
    if (plan.prefix.empty()) return {};
    Payload payload{shape, DType::float32, n, 0, std::vector<uint8_t>(plan.room)};
    payload.bytes.resize(cpu::write_payload(plan, payload.bytes.data(), on));
    payload.begin = static_cast<int64_t>(plan.prefix.size()) + entry_bytes(false) * block_count(n) + 4;
    return payload;
}

static void mutate_payload(const Payload& seed) {
    std::vector<uint8_t> bytes = seed.bytes;
    for (int k = rand() % 5; k > 0; --k) {
        const size_t at = rand() % 2 ? rand() % seed.begin : rand() % bytes.size();
        bytes[at] = static_cast<uint8_t>(rand() % 3 ? rand() : bytes[at] ^ 1 << rand() % 8);
    }
    if (rand() % 8 == 0) {
        bytes.resize(bytes.size() - rand() % (bytes.size() / 2));
        if (bytes.size() > 16) put(bytes.data() + 8, static_cast<uint64_t>(bytes.size()));
    }
    std::vector<uint8_t> sealed(bytes);  // exactly as long as the data
    if (rand() % 2 && static_cast<int64_t>(sealed.size()) >= seed.begin)
        put(sealed.data() + seed.begin - 4, crc32c(0, sealed.data(), seed.begin - 4));
    for (const char* isa : {"scalar", "avx2", "avx512"}) {
        limit_isa(isa);
        std::vector<uint8_t> out(seed.n * item_bytes(seed.dtype));
        const Target target{seed.dtype, out.data(), rand() % 2 == 0, 1.0};
        const Launch on{-1, 1, nullptr};
        cpu::decode_payload(sealed.data(), static_cast<int64_t>(sealed.size()), seed.shape, seed.n, target,
                            rand() % 2 == 0, on);
    }
}

// Valid inputs to start from: symbols of a few shapes of distribution, encoded.
static std::vector<uint8_t> seed_input(unsigned kind) {
    const int64_t levels = kind > 11       ? 256
                           : kind % 3 == 0 ? 40
                           : kind % 3 == 1 ? 200
                                           : 600,
                  n = kind % 2 ? 3000 : 70001;
    std::vector<float> x(n);
    for (int64_t i = 0; i < n; ++i) {
        double sum = 0;
        for (int k = 0; k < 4; ++k) sum += rand() / static_cast<double>(RAND_MAX);
        x[i] = static_cast<float>(sum - 2);
    }
    x[0] = -2.5f;
    x[1] = 2.5f;
    const Values values{DType::float32, x.data(), n};
    const Launch on{-1, 1, nullptr};
    std::vector<int64_t> counts(levels);
    const Scheme scheme{levels, -2.5, 2.5, 0, nullptr, false, {}};
    cpu::symbol_counts(values, scheme, counts.data(), on);
    std::vector<uint8_t> lengths(levels), packed(levels);
    code_lengths(counts.data(), levels, lengths.data());
    int64_t bits = 0;
    for (int64_t s = 0; s < levels; ++s) bits += counts[s] * lengths[s];
    std::vector<uint8_t> out(coded_bytes_bound(n, bits));
    std::vector<BlockEntry> table(block_count(n));
    const int64_t room = static_cast<int64_t>(out.size());
    const int64_t size =
        cpu::encode_blocks(values, scheme, {lengths.data(), 0}, nullptr, out.data(), room, table.data(), on);
    const int64_t length_bytes = pack_lengths(lengths.data(), levels, packed.data());
    std::vector<uint8_t> input = {static_cast<uint8_t>((levels - 2) & 255),
                                  static_cast<uint8_t>((levels - 2) >> 8),
                                  static_cast<uint8_t>(kind),
                                  static_cast<uint8_t>(kind & 2 | (kind & 4) * 2 | (levels == 256 ? 16 : 0)),
                                  static_cast<uint8_t>((n - 1) & 255),
                                  static_cast<uint8_t>((n - 1) >> 8 & 255),
                                  static_cast<uint8_t>((n - 1) >> 16),
                                  static_cast<uint8_t>(length_bytes),
                                  0};
    if (length_bytes > 255) return {};
    input.insert(input.end(), packed.begin(), packed.begin() + length_bytes);
    input.insert(input.end(), out.begin(), out.begin() + size);
    return input;
}

int main(int argc, char** argv) {
    const long count = argc > 1 ? atol(argv[1]) : 200000;
    srand(1);
    std::vector<std::vector<uint8_t>> seeds;
    for (unsigned kind = 0; kind < 16; ++kind) seeds.push_back(seed_input(kind));
    std::vector<Payload> payloads;
    for (unsigned kind = 0; kind < 12; ++kind) {
        Payload payload = seed_payload(kind);
        if (!payload.bytes.empty()) payloads.push_back(payload);
    }
    for (long i = 0; i < count; ++i) {
        mutate_payload(payloads[rand() % payloads.size()]);
        std::vector<uint8_t> input = seeds[rand() % seeds.size()];
        if (input.empty()) continue;
        // Mostly small inputs, which are fast and reach the ends of blocks.
        if (rand() % 8 != 0 && input.size() > 4000) continue;
        // Sometimes another kind of payload, its escapes behind what there is.
        if (rand() % 4 == 0) {
            input[3] ^= static_cast<uint8_t>(1 << rand() % 5);
            input[8] = static_cast<uint8_t>(rand() % 4);
            if (input[3] & 4)
                input.resize(input.size() + input[8] * (2 + (input[2] % 4 == 1 ? 8 : input[2] % 4 ? 2 : 4)));
        }
        for (int k = rand() % 6; k > 0; --k) {
            const size_t at = rand() % (rand() % 4 == 0 ? 64 : input.size());
            if (at < input.size()) input[at] = static_cast<uint8_t>(rand());
        }
        if (rand() % 4 == 0) input.resize(input.size() - rand() % (input.size() / 2));
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    printf("%ld mutations of either kind, nothing found\n", count);
    return 0;
}

#endif
