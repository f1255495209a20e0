// The C++ decoder under AddressSanitizer and UndefinedBehaviorSanitizer, on bytes that no header has vouched for.
//
//   make fuzz                        builds with $(CXX) and runs 200,000 mutations
//   clang++ -fsanitize=fuzzer ...    with -DPLATONIC_LIBFUZZER: a libFuzzer target
//
// An input is taken apart into an alphabet, its code lengths, a number of values and their blocks; inputs of which that
// cannot be made are skipped. Block sizes are those that payload.py lets through and no others.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/cpu.h"
#include "weight_compression/code_lengths.h"
#include "weight_compression/codec.h"

using namespace platonic;

static void decode(const uint8_t* data, size_t size, const char* isa) {
    if (size < 8) return;
    limit_isa(isa);
    const int64_t levels = 2 + (data[0] | data[1] << 8) % 600;
    const DType dtype = static_cast<DType>(data[2] % 4);
    const bool fixed = data[3] & 1, accumulate = data[3] & 2;
    const int64_t n = 1 + (data[4] | data[5] << 8 | (data[6] & 3) << 16);
    std::vector<uint8_t> lengths(levels);
    const int64_t packed = data[7];
    size_t at = 8 + packed;
    CanonicalCode code;
    if (!fixed && (size < at || !unpack_lengths(data + 8, packed, levels, lengths.data()) ||
                   !make_canonical(lengths.data(), levels, &code)))
        return;
    if (fixed) at = 8;
    // Exactly as long as the data, on the heap: whoever reads beyond is seen.
    const std::vector<uint8_t> blocks(data + at, data + size);
    const int64_t count = block_count(n), bits = fixed_bits(levels);
    std::vector<BlockEntry> table(count);
    int64_t left = static_cast<int64_t>(blocks.size());
    for (int64_t b = 0; b < count; ++b) {
        int64_t bytes = b == count - 1 ? left : left / count / 2 * 2;
        const int64_t symbols = b == count - 1 ? n - b * block_symbols : block_symbols;
        if (fixed) bytes = fixed_block_bytes(symbols, static_cast<int>(bits));
        if (bytes > left || (!fixed && (bytes < block_state_bytes || bytes > max_block_bytes || bytes % 2))) return;
        table[b] = {static_cast<uint32_t>(bytes), 0};
        left -= bytes;
    }
    if (left != 0) return;
    std::vector<uint8_t> out(n * item_bytes(dtype));
    const Target target{dtype, out.data(), accumulate, 0.5};
    const Coding coding{levels, fixed ? nullptr : lengths.data(), static_cast<int>(bits)};
    cpu::decode_blocks(blocks.data(), static_cast<int64_t>(blocks.size()), table.data(), n, -1.0, 2.0, coding, target,
                       false, Launch{-1, 1, nullptr});
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    for (const char* isa : {"scalar", "avx2", "avx512"}) decode(data, size, isa);
    return 0;
}

#if !defined(PLATONIC_LIBFUZZER)

// Valid inputs to start from: symbols of a few shapes of distribution, encoded.
static std::vector<uint8_t> seed_input(unsigned kind) {
    const int64_t levels = kind % 3 == 0 ? 40 : kind % 3 == 1 ? 200 : 600, n = kind % 2 ? 3000 : 70001;
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
    cpu::symbol_counts(values, -2.5, 2.5, levels, counts.data(), on);
    std::vector<uint8_t> lengths(levels), packed(levels);
    code_lengths(counts.data(), levels, lengths.data());
    int64_t bits = 0;
    for (int64_t s = 0; s < levels; ++s) bits += counts[s] * lengths[s];
    std::vector<uint8_t> out(coded_bytes_bound(n, bits));
    std::vector<BlockEntry> table(block_count(n));
    const int64_t room = static_cast<int64_t>(out.size());
    const int64_t size =
        cpu::encode_blocks(values, -2.5, 2.5, {levels, lengths.data(), 0}, out.data(), room, table.data(), on);
    const int64_t length_bytes = pack_lengths(lengths.data(), levels, packed.data());
    std::vector<uint8_t> input = {static_cast<uint8_t>((levels - 2) & 255),
                                  static_cast<uint8_t>((levels - 2) >> 8),
                                  static_cast<uint8_t>(kind),
                                  static_cast<uint8_t>(kind & 2),
                                  static_cast<uint8_t>((n - 1) & 255),
                                  static_cast<uint8_t>((n - 1) >> 8 & 255),
                                  static_cast<uint8_t>((n - 1) >> 16),
                                  static_cast<uint8_t>(length_bytes)};
    if (length_bytes > 255) return {};
    input.insert(input.end(), packed.begin(), packed.begin() + length_bytes);
    input.insert(input.end(), out.begin(), out.begin() + size);
    return input;
}

int main(int argc, char** argv) {
    const long count = argc > 1 ? atol(argv[1]) : 200000;
    srand(1);
    std::vector<std::vector<uint8_t>> seeds;
    for (unsigned kind = 0; kind < 12; ++kind) seeds.push_back(seed_input(kind));
    for (long i = 0; i < count; ++i) {
        std::vector<uint8_t> input = seeds[rand() % seeds.size()];
        if (input.empty()) continue;
        // Mostly small inputs, which are fast and reach the ends of blocks.
        if (rand() % 8 != 0 && input.size() > 4000) continue;
        for (int k = rand() % 6; k > 0; --k) {
            const size_t at = rand() % (rand() % 4 == 0 ? 64 : input.size());
            if (at < input.size()) input[at] = static_cast<uint8_t>(rand());
        }
        if (rand() % 4 == 0) input.resize(input.size() - rand() % (input.size() / 2));
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    printf("%ld mutations, nothing found\n", count);
    return 0;
}

#endif
