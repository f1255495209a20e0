// Blocks of symbols, decoded. See stream.h and huffman_simd.h for how. Nothing is read beyond the blocks nor written
// beyond the output, whatever the bytes are.
#include <atomic>
#include <cstring>
#include <vector>

#include "common/exact_denormals.h"
#include "common/half.h"
#include "common/parallel.h"
#include "weight_compression/blocks.h"
#include "weight_compression/codec.h"
#include "weight_compression/crc32c.h"
#include "weight_compression/fixed_simd.h"

namespace platonic {
namespace cpu {
namespace {

constexpr int64_t most_read = 2 * chunk;  // bytes that a block's rows may take between two looks at its end

struct Decoder {
    const DecodeTables& tables;
    const Dequantization z;
    const Target& out;
    const bool fused;          // straight into float32 values
    const uint8_t* const end;  // of what may be read

    struct Block {
        int64_t first, size;  // of its values
        const uint8_t* data;
        int64_t bytes;
    };

    // Decodes 1 to 2 * most_pairs blocks of equal size; false if one is malformed, and `bad` says which.
    bool run(const Block* blocks, int count, int* bad) const {
        DecodePair pair[most_pairs];
        const uint8_t* ends[2 * most_pairs];
        const int pairs = (count + 1) / 2;
        // What the second half of an odd pair decodes, its first half once more, goes here.
        float* spare_values = thread_buffer<float, 0>(chunk);
        uint16_t* spare_symbols = thread_buffer<uint16_t, 0>(2 * most_pairs * chunk);
        for (int i = 0; i < 2 * pairs; ++i) {
            const Block& block = blocks[i < count ? i : i - 1];
            if (!start(block, pair[i / 2], i % 2, i, &ends[i])) return *bad = i, false;
        }
        const int64_t rows = blocks[0].size / stream_lanes;
        for (int64_t row = 0; row < rows; row += chunk_rows) {
            const int64_t step = smaller(chunk_rows, rows - row);
            for (int i = 0; i < 2 * pairs; ++i) {
                if (pair[i / 2].next[i % 2] > ends[i]) return *bad = smaller(i, count - 1), false;
                pair[i / 2].symbols[i % 2] = spare_symbols + i * chunk;
                if (fused)
                    pair[i / 2].values[i % 2] =
                        i < count ? static_cast<float*>(out.data) + blocks[i].first + row * stream_lanes : spare_values;
            }
            if (fused) {
                PLATONIC_DISPATCH(
                    decode_values(tables, pair, pairs, step, z.single, out.accumulate, static_cast<float>(out.scale)));
                continue;
            }
            PLATONIC_DISPATCH(decode_symbols(tables, pair, pairs, step));
            for (int i = 0; i < count; ++i)
                PLATONIC_DISPATCH(dequantize_chunk(out, z, blocks[i].first + row * stream_lanes, step * stream_lanes,
                                                   spare_symbols + i * chunk));
        }
        for (int i = 0; i < count; ++i)
            if (!finish(blocks[i], pair[i / 2], i % 2, ends[i])) return *bad = i, false;
        return true;
    }

private:
    static bool fits(const Block& block) {
        return block.bytes >= block_state_bytes && block.bytes <= max_block_bytes && block.bytes % 2 == 0;
    }

    bool start(const Block& block, DecodePair& pair, int h, int index, const uint8_t** block_end) const {
        if (!fits(block)) return false;
        for (int l = 0; l < stream_lanes; ++l) {
            uint32_t bits = 0;
            for (int b = 0; b < 4; ++b) bits |= static_cast<uint32_t>(block.data[4 * l + b]) << (8 * b);
            if (bits < 0x10000) return false;
            const int fill = 31 - __builtin_clz(bits);  // 16 to 31
            const uint32_t aligned = bits << (31 - fill) << 1;
            pair.state.top[2 * l + h] = static_cast<uint16_t>(aligned >> 16);
            pair.state.low[2 * l + h] = static_cast<uint16_t>(aligned);
            pair.state.fill[2 * l + h] = static_cast<uint16_t>(fill - 16);
        }
        const uint8_t* words = block.data + block_state_bytes;
        const int64_t bytes = block.bytes - block_state_bytes;
        if (words + bytes + most_read > end) {  // the payload's last blocks: rows may look beyond their words
            uint8_t* copy = thread_buffer<uint8_t, 0>(2 * most_pairs * (max_block_bytes + most_read)) +
                            index * (max_block_bytes + most_read);
            memcpy(copy, words, bytes);
            memset(copy + bytes, 0, most_read);
            words = copy;
        }
        pair.next[h] = words;
        *block_end = words + bytes;
        return true;
    }

    // The incomplete last row, and that nothing is left.
    bool finish(const Block& block, DecodePair& pair, int h, const uint8_t* block_end) const {
        if (pair.next[h] != block_end) return false;
        const int64_t rest = block.size % stream_lanes;
        uint16_t symbols[stream_lanes];
        for (int l = 0; l < stream_lanes; ++l) {
            uint32_t bits = static_cast<uint32_t>(pair.state.top[2 * l + h]) << 16 | pair.state.low[2 * l + h];
            int fill = pair.state.fill[2 * l + h];
            if (l < rest) {
                const uint32_t entry = tables.entries[bits >> (32 - tables.code.longest)];
                symbols[l] = static_cast<uint16_t>(entry >> 4);
                bits <<= entry & 15;
                fill -= static_cast<int>(entry & 15);
            }
            if (bits != 0 || fill != 0) return false;
        }
        if (rest > 0) PLATONIC_DISPATCH(dequantize_chunk(out, z, block.first + block.size - rest, rest, symbols));
        return true;
    }
};

// Reports the lowest block that failed, whichever thread found it first.
class FirstFailure {
public:
    void report(int64_t block, DecodeStatus status) {
        const int64_t key = block * 4 + static_cast<int>(status);
        int64_t seen = key_.load();
        while (key < seen && !key_.compare_exchange_weak(seen, key)) {
        }
    }
    DecodeResult result() const {
        const int64_t key = key_.load();
        if (key == none) return {DecodeStatus::ok, 0};
        return {static_cast<DecodeStatus>(key % 4), key / 4};
    }

private:
    static constexpr int64_t none = INT64_MAX;
    std::atomic<int64_t> key_{none};
};

// Calls run(a function of a and b, as the dtype stores them, that returns a + scale * b).
template <class F>
void with_addition(const Target& out, const F& run) {
    const double wide = out.scale;
    const float scale = static_cast<float>(wide);
    if (out.dtype == DType::float64) return run([=](double a, double b) { return a + wide * b; });
    if (out.dtype == DType::float32) return run([=](float a, float b) { return a + scale * b; });
    if (out.dtype == DType::float16)
        return run([=](uint16_t a, uint16_t b) { return float_to_half(half_to_float(a) + scale * half_to_float(b)); });
    run([=](uint16_t a, uint16_t b) { return float_to_bfloat(bfloat_to_float(a) + scale * bfloat_to_float(b)); });
}

// The values of a block that are stored exactly, behind its codes. They replace what the codes stand for there; when
// accumulating, what was there before.
class Escapes {
public:
    Escapes(const Target& out, int64_t first, int64_t size, const uint8_t* data, int64_t count)
        : out_(out), first_(first), count_(count), item_(item_bytes(out.dtype)), positions_(data) {
        int64_t next = 0;
        for (int64_t i = 0; i < count && valid_; ++i) {
            valid_ = position(i) >= next && position(i) < size;
            next = position(i) + 1;
        }
        if (!valid_ || !out.accumulate) return;
        before_.resize(count * item_);
        for (int64_t i = 0; i < count; ++i) memcpy(&before_[i * item_], place(i), item_);
    }

    bool valid() const { return valid_; }

    void apply() const {
        for (int64_t i = 0; i < count_; ++i) {
            const uint8_t* value = positions_ + 2 * count_ + i * item_;
            if (out_.accumulate)
                add(&before_[i * item_], value, place(i));
            else
                memcpy(place(i), value, item_);
        }
    }

private:
    const Target& out_;
    const int64_t first_, count_, item_;
    const uint8_t* const positions_;
    std::vector<char> before_;
    bool valid_ = true;

    int64_t position(int64_t i) const { return positions_[2 * i] | positions_[2 * i + 1] << 8; }
    char* place(int64_t i) const { return static_cast<char*>(out_.data) + (first_ + position(i)) * item_; }

    void add(const void* before, const void* value, void* to) const {
        with_addition(out_, [&](auto sum_of) {
            decltype(sum_of(0, 0)) terms[2];
            memcpy(&terms[0], before, sizeof terms[0]);
            memcpy(&terms[1], value, sizeof terms[1]);
            terms[0] = sum_of(terms[0], terms[1]);
            memcpy(to, &terms[0], sizeof terms[0]);
        });
    }
};

// What the tasks of one call share.
struct Job {
    const Blocks& blocks;
    const std::vector<int64_t> offsets;
    const int64_t n;
    const bool check;
    FirstFailure& failure;
    const int64_t first_block;  // in the results of decode_planes

    bool checksum_is_right(int64_t b) const {
        if (!check || crc32c(0, data(b), blocks.table[b].bytes) == blocks.table[b].checksum) return true;
        failure.report(first_block + b, DecodeStatus::checksum);
        return false;
    }
    void report_malformed(int64_t b) const { failure.report(first_block + b, DecodeStatus::malformed); }
    const uint8_t* data(int64_t b) const { return blocks.data + offsets[b]; }
    int64_t escapes(int64_t b) const { return blocks.escapes ? blocks.escapes[b] : 0; }
};

std::vector<int64_t> block_offsets(const Blocks& blocks, int64_t count) {
    std::vector<int64_t> offsets(count + 1);
    for (int64_t b = 0; b < count; ++b) offsets[b + 1] = offsets[b] + blocks.table[b].bytes;
    return offsets;
}

void decode_coded_task(const Decoder& decoder, const Job& job, int64_t first, int64_t count) {
    Decoder::Block blocks[2 * most_pairs];
    std::vector<Escapes> escapes;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t b = first + i;
        if (!job.checksum_is_right(b)) return;
        const int64_t size = symbols_of_block(job.n, b);
        const int64_t beside = job.escapes(b) * escape_bytes(decoder.out.dtype);
        blocks[i] = {b * block_symbols, size, job.data(b), job.blocks.table[b].bytes - beside};
        if (beside == 0) continue;
        if (blocks[i].bytes < block_state_bytes) return job.report_malformed(b);
        escapes.emplace_back(decoder.out, blocks[i].first, size, blocks[i].data + blocks[i].bytes, job.escapes(b));
        if (!escapes.back().valid()) return job.report_malformed(b);
    }
    // A shorter last block by itself.
    const int64_t even = count > 1 && blocks[count - 1].size != block_symbols ? count - 1 : count;
    int bad = 0;
    if (!decoder.run(blocks, static_cast<int>(even), &bad)) return job.report_malformed(first + bad);
    if (even < count && !decoder.run(blocks + even, 1, &bad)) return job.report_malformed(first + even);
    for (const Escapes& some : escapes) some.apply();
}

bool decode_fixed_block(const uint8_t* data, int64_t bytes, int64_t first, int64_t n, int bits, const Dequantization& z,
                        const Target& out) {
    if (bytes != fixed_block_bytes(n, bits)) return false;
    static_assert(chunk % 8 == 0, "chunks begin with a byte");
    const uint32_t levels = static_cast<uint32_t>(z.scheme.levels);
    uint16_t symbols[chunk];
    bool right = true;
    for (int64_t i = 0; i < n; i += chunk) {
        const int64_t size = smaller(chunk, n - i);
        right = right && PLATONIC_DISPATCH(unpack_fixed(data + i / 8 * bits, size, bits, symbols)) < levels;
        PLATONIC_DISPATCH(dequantize_chunk(out, z, first + i, size, symbols));
    }
    const int over = static_cast<int>(n * bits % 8);
    return right && (over == 0 || data[bytes - 1] >> over == 0);
}

void decode_fixed_task(const Job& job, int64_t b, int bits, const Dequantization& z, const Target& out) {
    if (!job.checksum_is_right(b)) return;
    const int64_t size = symbols_of_block(job.n, b), beside = job.escapes(b) * escape_bytes(out.dtype);
    const int64_t bytes = job.blocks.table[b].bytes - beside;
    if (bytes != fixed_block_bytes(size, bits)) return job.report_malformed(b);
    const Escapes escapes(out, b * block_symbols, size, job.data(b) + bytes, job.escapes(b));
    if (!escapes.valid() || !decode_fixed_block(job.data(b), bytes, b * block_symbols, size, bits, z, out))
        return job.report_malformed(b);
    escapes.apply();
}

}  // namespace

DecodeResult decode_blocks(const Blocks& blocks, int64_t n, const Scheme& scheme, const Coding& coding,
                           const Target& out, bool check, const Launch& on) {
    const ExactDenormals exact;
    const int64_t count = block_count(n);
    FirstFailure failure;
    const std::vector<int64_t> offsets = block_offsets(blocks, count);
    if (check && out.accumulate) {
        const Job job{blocks, offsets, n, true, failure, 0};
        parallel_for(count, on.threads, [&](int64_t b) { job.checksum_is_right(b); });
        if (failure.result().status != DecodeStatus::ok) return failure.result();
        check = false;
    }
    const Job job{blocks, offsets, n, check, failure, 0};
    const Dequantization z = make_dequantization(out.dtype, scheme);
    if (!coding.lengths) {
        parallel_for(count, on.threads, [&](int64_t b) { decode_fixed_task(job, b, coding.bits, z, out); });
        return failure.result();
    }
    CanonicalCode code;
    if (!make_canonical(coding.lengths, scheme.levels, &code)) return {DecodeStatus::malformed, 0};
    std::vector<DecodeTables> tables(1);
    make_decode_tables(coding.lengths, scheme.levels, code, tables.data());
    const bool fused = z.is_plain(out.dtype) && PLATONIC_DISPATCH(can_fuse_decoding());
    const Decoder decoder{tables[0], z, out, fused, blocks.data + blocks.size};
    // As many blocks at a time as hide the latency of one, if there is as much for every thread.
    const int64_t share = pieces(count, on.threads), group = smaller(2 * most_pairs, share + share % 2);
    parallel_for(pieces(count, group), on.threads, [&](int64_t task) {
        decode_coded_task(decoder, job, task * group, smaller(group, count - task * group));
    });
    return failure.result();
}

void add_values(const void* values, int64_t n, const Target& out, const Launch& on) {
    const ExactDenormals exact;
    with_addition(out, [&](auto sum_of) {
        typedef decltype(sum_of(0, 0)) T;
        const T* from = static_cast<const T*>(values);
        T* to = static_cast<T*>(out.data);
        parallel_for(pieces(n, segment), on.threads, [&](int64_t task) {
            for (int64_t i = task * segment; i < smaller((task + 1) * segment, n); ++i) to[i] = sum_of(to[i], from[i]);
        });
    });
}

// ---- planes of bytes ----

namespace {

constexpr int64_t planes_group = 2 * most_pairs;  // blocks of all planes that a task puts together

struct PlaneDecoder {
    const PlaneBlocks& plane;
    const Dequantization z;
    const Target& out;
    const Job job;
    std::vector<DecodeTables> tables;     // one if it is coded
    const std::vector<uint8_t> constant;  // a block of the value if there are no blocks

    // Of blocks [first, first + count): their units hold zeros in the plane's place.
    void run(int64_t first, int64_t count) const {
        if (plane.lengths) {
            const Decoder decoder{tables[0], z, out, false, plane.blocks.data + plane.blocks.size};
            return decode_coded_task(decoder, job, first, count);
        }
        for (int64_t b = first; b < first + count; ++b) {
            const bool raw = plane.blocks.table != nullptr;
            if (raw && !job.checksum_is_right(b)) return;
            const int64_t size = symbols_of_block(job.n, b);
            if (raw && job.blocks.table[b].bytes != size) return job.report_malformed(b);
            const uint8_t* bytes = raw ? job.data(b) : constant.data();
            PLATONIC_DISPATCH(put_bytes(out.data, z.scheme.plane, b * block_symbols, size, bytes));
        }
    }
};

}  // namespace

DecodeResult decode_planes(const PlaneBlocks* planes, int64_t n, int width, bool rotate, void* data, bool check,
                           const Launch& on) {
    const int64_t count = block_count(n);
    const Target out{DType::float32, data, false, 1.0};  // of no dtype: planes are merged as unsigned integers
    FirstFailure failure;
    std::vector<PlaneDecoder> decoders;
    for (int p = 0; p < width; ++p) {
        const PlaneBlocks& plane = planes[p];
        Dequantization z{};
        z.scheme.levels = 256;
        z.scheme.plane = {width, 8 * (width - 1 - p), rotate};
        std::vector<int64_t> offsets;
        if (plane.blocks.table) offsets = block_offsets(plane.blocks, count);
        decoders.push_back({plane,
                            z,
                            out,
                            {plane.blocks, offsets, n, check, failure, p * count},
                            {},
                            std::vector<uint8_t>(plane.blocks.table ? 0 : block_symbols, plane.value)});
        if (!plane.lengths) continue;
        CanonicalCode code;
        if (!make_canonical(plane.lengths, 256, &code)) return {DecodeStatus::malformed, p * count};
        decoders.back().tables.resize(1);
        make_decode_tables(plane.lengths, 256, code, decoders.back().tables.data());
    }
    parallel_for(pieces(count, planes_group), on.threads, [&](int64_t task) {
        const int64_t first = task * planes_group, some = smaller(planes_group, count - first);
        const int64_t begin = first * block_symbols, end = smaller(begin + some * block_symbols, n);
        memset(static_cast<char*>(data) + begin * width, 0, (end - begin) * width);
        for (const PlaneDecoder& decoder : decoders) decoder.run(first, some);
    });
    return failure.result();
}

}  // namespace cpu
}  // namespace platonic
