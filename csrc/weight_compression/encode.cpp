// Blocks of symbols, coded. See stream.h and huffman_simd.h for how.
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "common/exact_denormals.h"
#include "common/parallel.h"
#include "weight_compression/blocks.h"
#include "weight_compression/codec.h"
#include "weight_compression/crc32c.h"
#include "weight_compression/fixed_simd.h"

namespace platonic {
namespace cpu {
namespace {

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

// Values that are stored exactly, behind the codes of their block.
struct Escapes {
    const Values& x;
    const Scheme& scheme;
    const uint32_t* counts;  // null: there are none

    int64_t bytes(int64_t block) const { return counts ? counts[block] * escape_bytes(x.dtype) : 0; }

    void write(int64_t block, uint8_t* out) const {
        if (!counts || counts[block] == 0) return;
        const int64_t first = block * block_symbols, item = item_bytes(x.dtype), count = counts[block];
        uint16_t* positions = thread_buffer<uint16_t, 1>(block_symbols);
        const int64_t found =
            PLATONIC_DISPATCH(find_outside(x, scheme.lo, scheme.hi, first, symbols_of_block(x.n, block), positions));
        if (found != count) throw std::runtime_error("encode: the tensor was changed while it was being compressed");
        memcpy(out, positions, 2 * count);  // little endian, as all processors that this is built for
        out += 2 * count;
        for (int64_t i = 0; i < count; ++i)
            memcpy(out + i * item, static_cast<const char*>(x.data) + (first + positions[i]) * item, item);
    }
};

BlockEntry write_block(const EncodePair& pair, int h, const uint32_t* words, const Escapes& escapes, int64_t block,
                       uint8_t* out) {
    const int64_t count = pair.next[h] - words;
    for (int l = 0; l < stream_lanes; ++l) {
        const int at = 2 * l + h;
        const uint32_t bits =
            static_cast<uint32_t>(pair.state.top[at]) << 16 | pair.state.low[at] | 1u << (16 + pair.state.fill[at]);
        for (int b = 0; b < 4; ++b) out[4 * l + b] = static_cast<uint8_t>(bits >> (8 * b));
    }
    PLATONIC_DISPATCH(reverse_words(words, count, h, out + block_state_bytes));
    const int64_t coded = block_state_bytes + 2 * count, bytes = coded + escapes.bytes(block);
    escapes.write(block, out + coded);
    return {static_cast<uint32_t>(bytes), crc32c(0, out, bytes)};
}

int64_t encode_coded(const Values& x, const Quantization& z, const uint8_t* lengths, const Escapes& escapes,
                     uint8_t* out, int64_t room, BlockEntry* table, const Launch& on) {
    const int64_t levels = z.scheme.levels;
    CanonicalCode code;
    if (!make_canonical(lengths, levels, &code))
        throw std::invalid_argument("encode: the code lengths are not those of a complete code");
    std::vector<EncodeTables> tables(1);
    make_encode_tables(lengths, levels, code, tables.data());
    const bool fused = z.is_plain(x.dtype) && PLATONIC_DISPATCH(can_fuse_encoding());
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
        const auto bytes = [&](int h, int64_t b) {
            return block_state_bytes + 2 * (pair.next[h] - words[h]) + escapes.bytes(b);
        };
        const int64_t begin = chain.begin_of(task), middle = begin + bytes(0, block);
        const int64_t end = together ? middle + bytes(1, block + 1) : middle;
        if (end > room) {
            fits = false;
            return chain.set_end(task, room + 1);
        }
        if (!next || together) chain.set_end(task, end);
        table[block] = write_block(pair, 0, words[0], escapes, block, out + begin);
        if (together) table[block + 1] = write_block(pair, 1, words[1], escapes, block + 1, out + middle);
        if (!next || together) return;
        // A last block that is shorter than its neighbour goes by itself, after the neighbour has been written.
        encoder.run(block + 1, false, pair, words);
        const int64_t last = middle + bytes(0, block + 1);
        if (last > room) {
            fits = false;
            return chain.set_end(task, room + 1);
        }
        table[block + 1] = write_block(pair, 0, words[0], escapes, block + 1, out + middle);
        chain.set_end(task, last);
    };
    parallel_for(tasks, on.threads, [&](int64_t task) {
        try {
            encode(task);
        } catch (...) {
            chain.set_end(task, room + 1);  // nobody waits for what will not come
            throw;
        }
    });
    return fits ? chain.total() : -1;
}

int64_t encode_fixed(const Values& x, const Quantization& z, int bits, const Escapes& escapes, uint8_t* out,
                     int64_t room, BlockEntry* table, const Launch& on) {
    const int64_t blocks = block_count(x.n);
    std::vector<int64_t> begin(blocks + 1);
    for (int64_t b = 0; b < blocks; ++b)
        begin[b + 1] = begin[b] + fixed_block_bytes(symbols_of_block(x.n, b), bits) + escapes.bytes(b);
    if (begin[blocks] > room) return -1;
    parallel_for(blocks, on.threads, [&](int64_t block) {
        const int64_t n = symbols_of_block(x.n, block);
        uint8_t* const start = out + begin[block];
        uint16_t symbols[chunk];
        for (int64_t i = 0; i < n; i += chunk) {
            const int64_t size = smaller(chunk, n - i);
            PLATONIC_DISPATCH(quantize_chunk(x, z, block * block_symbols + i, size, symbols));
            PLATONIC_DISPATCH(pack_fixed(symbols, size, bits, start + i / 8 * bits));
        }
        escapes.write(block, start + fixed_block_bytes(n, bits));
        const int64_t bytes = begin[block + 1] - begin[block];
        table[block] = {static_cast<uint32_t>(bytes), crc32c(0, start, bytes)};
    });
    return begin[blocks];
}

}  // namespace

int64_t encode_blocks(const Values& x, const Scheme& scheme, const Coding& coding, const uint32_t* escape_counts,
                      uint8_t* out, int64_t room, BlockEntry* table, const Launch& on) {
    const ExactDenormals exact;
    const Quantization z = make_quantization(x.dtype, scheme);
    const Escapes escapes{x, scheme, escape_counts};
    return coding.lengths ? encode_coded(x, z, coding.lengths, escapes, out, room, table, on)
                          : encode_fixed(x, z, coding.bits, escapes, out, room, table, on);
}

void copy_plane(const Values& x, const Plane& plane, uint8_t* out, BlockEntry* table, const Launch& on) {
    parallel_for(block_count(x.n), on.threads, [&](int64_t block) {
        const int64_t first = block * block_symbols, n = symbols_of_block(x.n, block);
        PLATONIC_DISPATCH(take_bytes(x.data, plane, first, n, out + first));
        table[block] = {static_cast<uint32_t>(n), crc32c(0, out + first, n)};
    });
}

void checksum_blocks(const uint8_t* data, int64_t size, int64_t block, BlockEntry* table, const Launch& on) {
    parallel_for(pieces(size, block), on.threads, [&](int64_t i) {
        const int64_t bytes = smaller(block, size - i * block);
        table[i] = {static_cast<uint32_t>(bytes), crc32c(0, data + i * block, bytes)};
    });
}

}  // namespace cpu
}  // namespace platonic
