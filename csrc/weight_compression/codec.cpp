// Tensors cut into blocks, blocks into tasks. Sizes alone decide the cuts: results are the same for any number of
// threads.
#include "weight_compression/codec.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "common/exact_denormals.h"
#include "common/parallel.h"
#include "weight_compression/crc32c.h"
#include "weight_compression/huffman_simd.h"
#include "weight_compression/levels.h"

namespace platonic {
namespace cpu {
namespace {

constexpr int64_t segment = 1 << 20;  // values of a task that only reads
constexpr int64_t chunk = chunk_rows * stream_lanes;
constexpr int64_t most_read = 2 * chunk;  // bytes that a block's rows may take between two looks at its end

int64_t pieces(int64_t n, int64_t size) { return n / size + (n % size != 0); }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory of a thread that outlives the call: what a task needs would cost more to ask for than to fill.
template <class T, int slot>
T* thread_buffer(int64_t size) {
    thread_local std::vector<T> buffer;
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
}

}  // namespace

Range value_range(const Values& x, const Launch& on) {
    const ExactDenormals exact;
    std::vector<Range> parts(pieces(x.n, segment));
    parallel_for(static_cast<int64_t>(parts.size()), on.threads, [&](int64_t task) {
        const int64_t first = task * segment;
        parts[task] = PLATONIC_DISPATCH(value_range(x, first, smaller(segment, x.n - first)));
    });
    Range range = parts[0];
    for (const Range& part : parts) {
        if (part.lo < range.lo) range.lo = part.lo;
        if (part.hi > range.hi) range.hi = part.hi;
        range.finite = range.finite && part.finite;
    }
    return range;
}

void sample_counts(const Values& x, double lo, double hi, int64_t bins, double fraction, int64_t* counts) {
    const ExactDenormals exact;
    const Quantization z = make_quantization(x.dtype, lo, hi, bins);
    for (int64_t i = 0; i < bins; ++i) counts[i] = 0;
    uint16_t symbols[sample_everything];
    const bool all = x.n <= sample_everything;
    const int64_t runs = all ? 1 : sample_runs(x.n, fraction), run = all ? x.n : sample_run;
    const char* data = static_cast<const char*>(x.data);
    const int64_t item = item_bytes(x.dtype), apart = x.n / runs;
    for (int64_t r = 0; r < runs; ++r) {
        // Runs lie too far apart for the hardware to see them coming.
        if (r + 16 < runs)
            for (int64_t line = 0; line < run * item; line += 64)
                __builtin_prefetch(data + (r + 16) * apart * item + line);
        PLATONIC_DISPATCH(quantize_chunk(x, z, r * apart, run, symbols));
        for (int64_t i = 0; i < run; ++i) ++counts[symbols[i]];
    }
}

void symbol_counts(const Values& x, double lo, double hi, int64_t levels, int64_t* counts, const Launch& on) {
    const ExactDenormals exact;
    const Quantization z = make_quantization(x.dtype, lo, hi, levels);
    const int64_t tasks = pieces(x.n, segment);
    std::vector<int64_t> parts(tasks * levels);
    parallel_for(tasks, on.threads, [&](int64_t task) {
        struct alignas(64) Counters {
            uint8_t bytes[counter_bytes];
        };
        Counters* counters = thread_buffer<Counters, 0>(1);
        const int64_t first = task * segment;
        PLATONIC_DISPATCH(
            count_symbols(x, z, first, smaller(segment, x.n - first), &parts[task * levels], counters->bytes));
    });
    for (int64_t s = 0; s < levels; ++s) {
        counts[s] = 0;
        for (int64_t task = 0; task < tasks; ++task) counts[s] += parts[task * levels + s];
    }
}

// ---- encoding ----

namespace {

int64_t symbols_of_block(int64_t n, int64_t block) { return smaller(block_symbols, n - block * block_symbols); }

// Where the blocks of a task go is known when those of the task before are as long as they are: tasks start in
// order, so whoever waits here waits for a task that is running.
class Chain {
public:
    explicit Chain(int64_t tasks) : ends_(tasks + 1) {
        for (auto& end : ends_) end.store(-1, std::memory_order_relaxed);
        ends_[0].store(0);
    }
    int64_t begin_of(int64_t task) const {
        int64_t begin;
        while ((begin = ends_[task].load(std::memory_order_acquire)) < 0) std::this_thread::yield();
        return begin;
    }
    void set_end(int64_t task, int64_t end) { ends_[task + 1].store(end, std::memory_order_release); }
    int64_t total() const { return ends_.back().load(); }

private:
    std::vector<std::atomic<int64_t>> ends_;
};

struct Encoder {
    const Values& x;
    const Quantization z;
    const EncodeTables& tables;
    const bool fused;  // straight from float32 values

    // Codes the blocks `block` and, if `two`, the next, of equal size. Words go to words[2].
    void run(int64_t block, bool two, EncodePair& pair, uint32_t* const* words) const {
        const int64_t size = symbols_of_block(x.n, block), rows = size / stream_lanes, rest = size % stream_lanes;
        memset(&pair.state, 0, sizeof pair.state);
        const int64_t first[2] = {block * block_symbols, (two ? block + 1 : block) * block_symbols};
        for (int h = 0; h < 2; ++h) {
            pair.next[h] = words[h];
            if (rest > 0) start_lanes(first[h] + rows * stream_lanes, rest, h, pair);
        }
        if (fused) {
            for (int64_t end = rows; end > 0;) {
                const int64_t step = end % chunk_rows == 0 ? chunk_rows : end % chunk_rows;
                for (int h = 0; h < 2; ++h)
                    pair.values[h] = static_cast<const float*>(x.data) + first[h] + end * stream_lanes;
                PLATONIC_DISPATCH(encode_values(tables, pair, step, z.single));
                end -= step;
            }
            return;
        }
        uint16_t symbols[2][chunk];
        for (int64_t end = rows; end > 0;) {
            const int64_t step = end % chunk_rows == 0 ? chunk_rows : end % chunk_rows;
            end -= step;
            for (int h = 0; h < (two ? 2 : 1); ++h)
                PLATONIC_DISPATCH(quantize_chunk(x, z, first[h] + end * stream_lanes, step * stream_lanes, symbols[h]));
            pair.symbols[0] = symbols[0] + step * stream_lanes;
            pair.symbols[1] = symbols[two ? 1 : 0] + step * stream_lanes;
            PLATONIC_DISPATCH(encode_symbols(tables, pair, step));
        }
    }

    // The last, incomplete row: its codes go on top of the 16 zero bits, which leaves room for any.
    void start_lanes(int64_t first, int64_t count, int h, EncodePair& pair) const {
        uint16_t symbols[stream_lanes];
        PLATONIC_DISPATCH(quantize_chunk(x, z, first, count, symbols));
        for (int64_t l = 0; l < count; ++l) {
            const uint32_t code = tables.codes[symbols[l]];
            pair.state.top[2 * l + h] = static_cast<uint16_t>(code);
            pair.state.fill[2 * l + h] = static_cast<uint16_t>(code >> 16);
        }
    }
};

BlockEntry write_block(const EncodePair& pair, int h, const uint32_t* words, uint8_t* out) {
    const int64_t count = pair.next[h] - words;
    for (int l = 0; l < stream_lanes; ++l) {
        const int at = 2 * l + h;
        const uint32_t bits =
            static_cast<uint32_t>(pair.state.top[at]) << 16 | pair.state.low[at] | 1u << (16 + pair.state.fill[at]);
        for (int b = 0; b < 4; ++b) out[4 * l + b] = static_cast<uint8_t>(bits >> (8 * b));
    }
    PLATONIC_DISPATCH(reverse_words(words, count, h, out + block_state_bytes));
    const int64_t bytes = block_state_bytes + 2 * count;
    return {static_cast<uint32_t>(bytes), crc32c(0, out, bytes)};
}

int64_t encode_coded(const Values& x, const Quantization& z, const uint8_t* lengths, uint8_t* out, int64_t room,
                     BlockEntry* table, const Launch& on) {
    CanonicalCode code;
    if (!make_canonical(lengths, z.levels, &code))
        throw std::invalid_argument("encode: the code lengths are not those of a complete code");
    std::vector<EncodeTables> tables(1);
    make_encode_tables(lengths, z.levels, code, tables.data());
    const bool fused = x.dtype == DType::float32 && z.single.pre == 1 && PLATONIC_DISPATCH(can_fuse_encoding());
    const Encoder encoder{x, z, tables[0], fused};
    const int64_t blocks = block_count(x.n), tasks = (blocks + 1) / 2;
    Chain chain(tasks);
    std::atomic<bool> fits{true};
    const auto encode = [&](int64_t task) {
        constexpr int64_t most = (max_block_bytes - block_state_bytes) / 2 + stream_lanes;
        uint32_t* buffer = thread_buffer<uint32_t, 0>(2 * most);
        uint32_t* words[2] = {buffer, buffer + most};
        EncodePair pair;
        const int64_t block = 2 * task;
        const bool next = block + 1 < blocks;
        const bool together = next && symbols_of_block(x.n, block + 1) == block_symbols;
        encoder.run(block, together, pair, words);
        const auto bytes = [&](int h) { return block_state_bytes + 2 * (pair.next[h] - words[h]); };
        const int64_t begin = chain.begin_of(task), middle = begin + bytes(0);
        const int64_t end = together ? middle + bytes(1) : middle;
        if (end > room) {
            fits = false;
            return chain.set_end(task, room + 1);
        }
        if (!next || together) chain.set_end(task, end);
        table[block] = write_block(pair, 0, words[0], out + begin);
        if (together) table[block + 1] = write_block(pair, 1, words[1], out + middle);
        if (!next || together) return;
        // A last block that is shorter than its neighbour goes by itself, after the neighbour has been written.
        encoder.run(block + 1, false, pair, words);
        if (middle + bytes(0) > room) {
            fits = false;
            return chain.set_end(task, room + 1);
        }
        table[block + 1] = write_block(pair, 0, words[0], out + middle);
        chain.set_end(task, middle + bytes(0));
    };
    parallel_for(tasks, on.threads, [&](int64_t task) {
        try {
            encode(task);
        } catch (...) {
            chain.set_end(task, room + 1);  // nobody waits for what will not come
            throw;
        }
    });
    if (!fits) throw std::runtime_error("encode: the tensor was changed while it was being compressed");
    return chain.total();
}

int64_t encode_fixed(const Values& x, const Quantization& z, int bits, uint8_t* out, BlockEntry* table,
                     const Launch& on) {
    const int64_t block_bytes = fixed_block_bytes(block_symbols, bits);
    parallel_for(block_count(x.n), on.threads, [&](int64_t block) {
        const int64_t n = symbols_of_block(x.n, block);
        uint8_t* const start = out + block * block_bytes;
        uint8_t* p = start;
        uint64_t held = 0;
        int fill = 0;
        uint16_t symbols[chunk];
        for (int64_t i = 0; i < n; i += chunk) {
            const int64_t size = smaller(chunk, n - i);
            PLATONIC_DISPATCH(quantize_chunk(x, z, block * block_symbols + i, size, symbols));
            for (int64_t k = 0; k < size; ++k) {
                held |= static_cast<uint64_t>(symbols[k]) << fill;
                fill += bits;
                for (; fill >= 8; fill -= 8, held >>= 8) *p++ = static_cast<uint8_t>(held);
            }
        }
        if (fill > 0) *p++ = static_cast<uint8_t>(held);
        table[block] = {static_cast<uint32_t>(p - start), crc32c(0, start, p - start)};
    });
    return fixed_bytes(x.n, bits);
}

}  // namespace

int64_t encode_blocks(const Values& x, double lo, double hi, const Coding& coding, uint8_t* out, int64_t room,
                      BlockEntry* table, const Launch& on) {
    const ExactDenormals exact;
    const Quantization z = make_quantization(x.dtype, lo, hi, coding.levels);
    return coding.lengths ? encode_coded(x, z, coding.lengths, out, room, table, on)
                          : encode_fixed(x, z, coding.bits, out, table, on);
}

// ---- decoding ----

namespace {

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

void decode_coded_task(const Decoder& decoder, const uint8_t* data, const std::vector<int64_t>& offsets,
                       const BlockEntry* table, int64_t n, int64_t first, int64_t count, bool check,
                       FirstFailure& failure) {
    Decoder::Block blocks[2 * most_pairs];
    for (int64_t i = 0; i < count; ++i) {
        const int64_t b = first + i;
        blocks[i] = {b * block_symbols, symbols_of_block(n, b), data + offsets[b], table[b].bytes};
        if (check && crc32c(0, blocks[i].data, blocks[i].bytes) != table[b].checksum)
            return failure.report(b, DecodeStatus::checksum);
    }
    // A shorter last block by itself.
    const int64_t even = count > 1 && blocks[count - 1].size != block_symbols ? count - 1 : count;
    int bad = 0;
    if (!decoder.run(blocks, static_cast<int>(even), &bad)) return failure.report(first + bad, DecodeStatus::malformed);
    if (even < count && !decoder.run(blocks + even, 1, &bad)) failure.report(first + even, DecodeStatus::malformed);
}

bool decode_fixed_block(const uint8_t* data, int64_t bytes, int64_t first, int64_t n, const Coding& coding,
                        const Dequantization& z, const Target& out) {
    if (bytes != fixed_block_bytes(n, coding.bits)) return false;
    uint64_t held = 0;
    int fill = 0;
    uint16_t symbols[chunk];
    const uint8_t* p = data;
    uint64_t over = 0;
    for (int64_t i = 0; i < n; i += chunk) {
        const int64_t size = smaller(chunk, n - i);
        for (int64_t k = 0; k < size; ++k) {
            for (; fill < coding.bits; fill += 8) held |= static_cast<uint64_t>(*p++) << fill;
            const uint64_t symbol = held & ((uint64_t{1} << coding.bits) - 1);
            over |= symbol >= static_cast<uint64_t>(coding.levels);
            symbols[k] = static_cast<uint16_t>(symbol);
            held >>= coding.bits;
            fill -= coding.bits;
        }
        PLATONIC_DISPATCH(dequantize_chunk(out, z, first + i, size, symbols));
    }
    return over == 0 && held == 0;
}

}  // namespace

DecodeResult decode_blocks(const uint8_t* data, int64_t size, const BlockEntry* table, int64_t n, double lo, double hi,
                           const Coding& coding, const Target& out, bool check, const Launch& on) {
    const ExactDenormals exact;
    const int64_t blocks = block_count(n);
    std::vector<int64_t> offsets(blocks + 1);
    for (int64_t b = 0; b < blocks; ++b) offsets[b + 1] = offsets[b] + table[b].bytes;
    FirstFailure failure;
    if (check && out.accumulate) {
        parallel_for(blocks, on.threads, [&](int64_t b) {
            if (crc32c(0, data + offsets[b], table[b].bytes) != table[b].checksum)
                failure.report(b, DecodeStatus::checksum);
        });
        if (failure.result().status != DecodeStatus::ok) return failure.result();
        check = false;
    }
    const Dequantization z = make_dequantization(out.dtype, lo, hi, coding.levels);
    if (!coding.lengths) {
        parallel_for(blocks, on.threads, [&](int64_t b) {
            if (check && crc32c(0, data + offsets[b], table[b].bytes) != table[b].checksum)
                return failure.report(b, DecodeStatus::checksum);
            if (!decode_fixed_block(data + offsets[b], table[b].bytes, b * block_symbols, symbols_of_block(n, b),
                                    coding, z, out))
                failure.report(b, DecodeStatus::malformed);
        });
        return failure.result();
    }
    CanonicalCode code;
    if (!make_canonical(coding.lengths, coding.levels, &code)) return {DecodeStatus::malformed, 0};
    std::vector<DecodeTables> tables(1);
    make_decode_tables(coding.lengths, coding.levels, code, tables.data());
    const bool fused = out.dtype == DType::float32 && z.single.post == 1 && PLATONIC_DISPATCH(can_fuse_decoding());
    const Decoder decoder{tables[0], z, out, fused, data + size};
    // As many blocks at a time as hide the latency of one, if there is as much for every thread.
    const int64_t share = pieces(blocks, on.threads), group = smaller(2 * most_pairs, share + share % 2);
    parallel_for(pieces(blocks, group), on.threads, [&](int64_t task) {
        const int64_t first = task * group;
        decode_coded_task(decoder, data, offsets, table, n, first, smaller(group, blocks - first), check, failure);
    });
    return failure.result();
}

void checksum_blocks(const uint8_t* data, int64_t size, int64_t block, BlockEntry* table, const Launch& on) {
    parallel_for(pieces(size, block), on.threads, [&](int64_t i) {
        const int64_t bytes = smaller(block, size - i * block);
        table[i] = {static_cast<uint32_t>(bytes), crc32c(0, data + i * block, bytes)};
    });
}

}  // namespace cpu
}  // namespace platonic
