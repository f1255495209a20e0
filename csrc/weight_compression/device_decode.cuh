// Decompressing, second half: from blocks to values.
//
// decode_coded: a half warp decodes a block, a lane of the warp per lane of the stream; eight of them share a table of
// the code in shared memory. A row is a look-up, two shifts, a ballot that says which lanes take words and where from,
// and a look-up of the word: a chain of about 110 cycles, 30 instructions. With 16 warps a multiprocessor (see
// device_encode.cuh) issuing them takes 4 x 30 cycles a row, so that either bounds the 4,096 rows at 0.28 ms a GiB of
// float32; writing it takes about as long and goes on at the same time. Words reach a ring in shared memory 128 at a
// time, asked for eight rows before they can be wanted, in aligned loads wherever a block begins.
#pragma once

#include "weight_compression/device_parse.cuh"

namespace platonic {
namespace cuda {
namespace {

constexpr int decoding_threads = 128;
constexpr int decoding_blocks = decoding_threads / stream_lanes;  // payload blocks of a thread block
constexpr int decoded_rows = 8;                                   // between two looks at the ring
constexpr int refill_words = decoded_rows * stream_lanes;         // what those take at most
constexpr int ring_words = 4 * refill_words;

__global__ void __launch_bounds__(crc32c_threads) compare_checksums(DecompressCall call, DecompressScratch scratch) {
    const DecompressPlan& plan = *scratch.plan;
    if (*call.status & ~fault_checksum) return;  // of the header; other blocks may be setting this one
    const int each = entry_bytes(plan.escaped);
    for (int64_t b = blockIdx.x; b < plan.blocks; b += gridDim.x) {
        const uint32_t checksum = checksum_block(call.payload + plan.data + scratch.offsets[b], scratch.sizes[b]);
        if (threadIdx.x == 0 && checksum != get<uint32_t>(call.payload + plan.table + each * b + 4))
            atomicOr(call.status, fault_checksum);
    }
}

// Where values go, and the dequantiser of the next: that of all values, or of their group. Indices ascend.
template <class T>
class Output {
public:
    typedef typename T::Bits Bits;
    typedef typename T::Real R;

    __device__ Output(const DecompressCall& call, const DecompressPlan& plan)
        : data_(static_cast<Bits*>(call.out.data)),
          accumulate_(call.accumulate),
          scale_(call.scale),
          ranges_(call.payload + plan.ranges),
          group_size_(plan.group_size),
          levels_(plan.levels),
          end_(plan.groups > 0 ? 0 : INT64_MAX),
          z_{} {
        if (plan.groups == 0) z_ = make_dequantizer<R>(plan.lo, plan.hi, plan.levels);
    }
    __device__ __forceinline__ Bits old(int64_t i) const { return accumulate_ ? data_[i] : Bits(); }
    __device__ __forceinline__ void put(int64_t i, Bits old, uint32_t symbol) {
        if (i >= end_) enter(i / group_size_);
        store(i, old, T::narrow(value_of(z_, symbol)));
    }
    __device__ __forceinline__ void put_exact(int64_t i, Bits old, const uint8_t* value) const {
        store(i, old, get<Bits>(value));
    }

private:
    Bits* data_;
    bool accumulate_;
    double scale_;
    const uint8_t* ranges_;
    int64_t group_size_, levels_, end_;
    Dequantizer<R> z_;

    __device__ void enter(int64_t group) {
        const StoredRange<T> range = stored_range<T>(ranges_, group);
        end_ = (group + 1) * group_size_;
        z_ = range.lo == range.hi
                 ? Dequantizer<R>{range.lo, 0, 1}
                 : make_dequantizer<R>(static_cast<double>(range.lo), static_cast<double>(range.hi), levels_);
    }
    __device__ __forceinline__ void store(int64_t i, Bits old, Bits value) const {
        data_[i] = combine<T>(accumulate_, old, scale_, value);
    }
};

// The values of a block that are stored exactly: `count` positions behind its symbols, then the values.
template <class T>
struct Escapes {
    const uint8_t* data;
    int count;

    __device__ int position(int k) const { return get<uint16_t>(data + 2 * k); }
    __device__ const uint8_t* value(int k) const { return data + 2 * count + k * int{sizeof(typename T::Bits)}; }
    // Whether positions first, first + step, ... lie in a block of `size` symbols and behind the ones before.
    __device__ bool ascend(int first, int step, int size) const {
        bool good = true;
        for (int k = first; k < count; k += step)
            good &= position(k) < size && (k == 0 || position(k - 1) < position(k));
        return good;
    }
    // The first whose position is at least `place`, if they ascend.
    __device__ int first_from(int place) const {
        int low = 0, high = count;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (position(middle) < place)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }
};

template <class T>
__device__ Escapes<T> escapes_of(const DecompressCall& call, const DecompressPlan& plan,
                                 const DecompressScratch& scratch, int64_t b) {
    const uint8_t* const block = call.payload + plan.data + scratch.offsets[b];
    return {block + scratch.symbol_bytes(plan, call.out.item, b), static_cast<int>(scratch.escapes[b])};
}

// Eight words of a block for one lane of its half warp; those beyond `end` are 0.
__device__ __forceinline__ uint4 load_words(const uint8_t* p, const uint8_t* begin, const uint8_t* end) {
    return make_uint4(load_word(p, begin, end), load_word(p + 4, begin, end), load_word(p + 8, begin, end),
                      load_word(p + 12, begin, end));
}

// The words of one block, in order. All lanes of a half warp agree on how many have been loaded and taken.
class WordRing {
public:
    __device__ WordRing(uint32_t* ring, const DecompressCall& call, const uint8_t* words, int lane)
        : ring_(ring), begin_(call.payload), end_(call.payload + call.size), words_(words), lane_(lane) {}

    __device__ bool has_room() const { return loaded_ + refill_words - taken_ <= ring_words; }
    __device__ uint4 load() const { return load_words(words_ + 2 * loaded_ + 16 * lane_, begin_, end_); }
    __device__ void store(uint4 eight) {
        *reinterpret_cast<uint4*>(ring_ + (loaded_ % ring_words / 2 + 4 * lane_)) = eight;
        loaded_ += refill_words;
    }
    // The word `ahead` of those not yet taken.
    __device__ uint32_t word(int ahead) const {
        return reinterpret_cast<const uint16_t*>(ring_)[(taken_ + ahead) % ring_words];
    }
    __device__ void take(int count) { taken_ += count; }
    __device__ int taken() const { return taken_; }

private:
    uint32_t* ring_;
    const uint8_t *begin_, *end_, *words_;
    int lane_, loaded_ = 0, taken_ = 0;
};

// The escapes of a half warp's block among the next `refill_words` of its symbols.
template <class T>
class EscapeMarks {
public:
    __device__ EscapeMarks(const Escapes<T>& all, uint32_t* marks)
        : all_(all), marks_(marks), lane_(threadIdx.x % stream_lanes), half_(threadIdx.x & 16) {}

    // Those that follow the last ones and come before symbol begin + refill_words; all lanes of the warp call.
    __device__ void advance(int begin) {
        before_ = taken_;
        if (lane_ < refill_words / 32) marks_[lane_] = 0;
        __syncwarp();
        uint32_t found;
        do {
            const int k = taken_ + lane_, place = k < all_.count ? all_.position(k) - begin : refill_words;
            if (place < refill_words) atomicOr(&marks_[place / 32], 1u << (place % 32));
            found = __ballot_sync(full_warp, place < refill_words) >> half_ & 0xffff;
            taken_ += __popc(found);
        } while (__ballot_sync(full_warp, found == 0xffff) != 0);  // in either half
        __syncwarp();
    }
    // What replaces symbol `place` from `begin`, or null.
    __device__ const uint8_t* value_at(int place) const {
        const uint32_t word = marks_[place / 32], bit = 1u << (place % 32);
        if ((word & bit) == 0) return nullptr;
        int k = before_ + __popc(word & (bit - 1));
        for (int w = 0; w < place / 32; ++w) k += __popc(marks_[w]);
        return all_.value(k);
    }

private:
    Escapes<T> all_;
    uint32_t* marks_;
    int lane_, half_, before_ = 0, taken_ = 0;
};

template <class T>
__global__ void __launch_bounds__(decoding_threads) decode_coded(DecompressCall call, DecompressScratch scratch) {
    const DecompressPlan& plan = *scratch.plan;
    // fault_block may be set by blocks of this launch while others start; it must not stop some threads and not others.
    if ((*call.status & ~fault_block) != 0 || plan.mode != static_cast<int>(Mode::entropy)) return;
    typedef typename T::Bits Bits;
    __shared__ uint16_t table[table_size];
    __shared__ uint4 rings[decoding_blocks][ring_words / 8];
    __shared__ uint32_t marks[decoding_blocks][refill_words / 32];
    const int longest = plan.longest[0];
    for (int i = threadIdx.x; i < 1 << longest; i += decoding_threads) table[i] = scratch.tables[i];
    __syncthreads();

    const int lane = threadIdx.x % stream_lanes, half = threadIdx.x & 16, mine = threadIdx.x / stream_lanes;
    const uint32_t below = (1u << lane) - 1;
    const int64_t b = int64_t{blockIdx.x} * decoding_blocks + mine, first = b * block_symbols;
    const bool any = b < plan.blocks, escaped = plan.escaped;
    const int size = any ? static_cast<int>(symbols_of_block(call.out.n, b)) : 0;
    const int64_t bytes = any ? scratch.symbol_bytes(plan, call.out.item, b) : block_state_bytes;
    const int words = static_cast<int>((bytes - block_state_bytes) / 2);
    const uint8_t* const block = call.payload + plan.data + (any ? scratch.offsets[b] : 0);
    Output<T> out(call, plan);
    const int other = __shfl_xor_sync(full_warp, size, 16), longer = size > other ? size : other;
    const int groups = (longer + refill_words - 1) / refill_words;  // the same in both halves of a warp

    const uint32_t state = any ? get<uint32_t>(block + 4 * lane) : 0x10000;
    bool bad = state < 0x10000;
    int fill = bad ? 16 : 31 - __clz(state);
    uint32_t bits = bad ? 0 : state << (31 - fill) << 1;

    Escapes<T> beside{nullptr, 0};
    if (escaped) {
        if (any) beside = escapes_of<T>(call, plan, scratch, b);
        const bool good = beside.ascend(lane, stream_lanes, size);
        if ((__ballot_sync(full_warp, good) >> half & 0xffff) != 0xffff) beside.count = 0;
        bad |= !good;
    }
    EscapeMarks<T> exact(beside, marks[mine]);
    WordRing ring(reinterpret_cast<uint32_t*>(rings[mine]), call, block + block_state_bytes, lane);
    ring.store(any ? ring.load() : make_uint4(0, 0, 0, 0));
    for (int g = 0; g < groups; ++g) {
        __syncwarp();  // the ring's last words are there, and the last marks have been used
        const int row = g * decoded_rows;
        const bool room = ring.has_room();
        const uint4 coming = any && room ? ring.load() : make_uint4(0, 0, 0, 0);
        if (escaped) exact.advance(row * stream_lanes);
        Bits old[decoded_rows] = {};
        uint32_t symbols[decoded_rows];
#pragma unroll
        for (int r = 0; r < decoded_rows; ++r) {
            const int i = (row + r) * stream_lanes + lane;
            if (i < size) old[r] = out.old(first + i);
        }
#pragma unroll
        for (int r = 0; r < decoded_rows; ++r) {
            const uint32_t entry = table[bits >> (32 - longest)];
            const int length = (row + r) * stream_lanes + lane < size ? static_cast<int>(entry & 15) : 0;
            symbols[r] = entry >> 4;
            bits <<= length;
            fill -= length;
            const bool wants = fill < 16;
            const uint32_t taking = __ballot_sync(full_warp, wants) >> half & 0xffff;
            if (wants) {
                bits |= ring.word(__popc(taking & below)) << (16 - fill);
                fill += 16;
            }
            ring.take(__popc(taking));
        }
#pragma unroll
        for (int r = 0; r < decoded_rows; ++r) {
            const int i = (row + r) * stream_lanes + lane;
            if (i >= size) continue;
            const uint8_t* const value = escaped ? exact.value_at(r * stream_lanes + lane) : nullptr;
            if (value)
                out.put_exact(first + i, old[r], value);
            else
                out.put(first + i, old[r], symbols[r]);
        }
        if (room) ring.store(coming);
    }
    bad |= bits != 0 || fill != 16 || ring.taken() != words;
    if (bad) atomicOr(call.status, fault_block);
}

// A thread unpacks eight symbols, as many bytes as a symbol has bits.
template <class T>
__global__ void __launch_bounds__(grid_threads) decode_fixed(DecompressCall call, DecompressScratch scratch) {
    const DecompressPlan& plan = *scratch.plan;
    if ((*call.status & ~fault_block) != 0 || plan.mode != static_cast<int>(Mode::fixed)) return;
    const int bits = plan.bits;
    Output<T> out(call, plan);
    bool bad = false;
    for (int64_t i = 8 * first_thread(); i < call.out.n; i += 8 * all_threads()) {
        const int64_t b = i / block_symbols, size = smaller(8, call.out.n - i);
        const int place = static_cast<int>(i % block_symbols);
        const uint8_t* p = call.payload + plan.data + scratch.offsets[b] + place / 8 * bits;
        Escapes<T> beside{nullptr, 0};
        if (plan.escaped) {
            beside = escapes_of<T>(call, plan, scratch, b);
            const int symbols = static_cast<int>(symbols_of_block(call.out.n, b));
            bad |= !beside.ascend(place / 8, (symbols + 7) / 8, symbols);  // the threads of a block share its escapes
        }
        int next = beside.first_from(place);
        uint32_t held = 0;
        int fill = 0;
        for (int k = 0; k < size; ++k) {
            for (; fill < bits; fill += 8) held |= static_cast<uint32_t>(*p++) << fill;
            const uint32_t symbol = held & ((1u << bits) - 1);
            bad |= symbol >= plan.levels;
            if (next < beside.count && beside.position(next) == place + k)
                out.put_exact(i + k, out.old(i + k), beside.value(next++));
            else
                out.put(i + k, out.old(i + k), symbol);
            held >>= bits;
            fill -= bits;
        }
        bad |= held != 0;
    }
    if (bad) atomicOr(call.status, fault_block);
}

// Modes raw and constant, of any dtype.
__global__ void __launch_bounds__(grid_threads) decode_exact(DecompressCall call, DecompressScratch scratch) {
    const DecompressPlan& plan = *scratch.plan;
    if (*call.status != 0) return;
    uint8_t* const out = static_cast<uint8_t*>(call.out.data);
    const int64_t item = call.out.item;
    if (plan.mode == static_cast<int>(Mode::raw))
        copy_bytes(call.payload + plan.data, out, call.out.n * item);
    else if (plan.mode == static_cast<int>(Mode::constant)) {
        const uint8_t* const value = call.payload + own_begin(call.out.shape.dimensions);
        for (int64_t i = first_thread(); i < call.out.n; i += all_threads())
            for (int64_t k = 0; k < item; ++k) out[i * item + k] = value[k];
    }
}

template <class T>
__global__ void __launch_bounds__(grid_threads) add_exact(DecompressCall call, DecompressScratch scratch) {
    const DecompressPlan& plan = *scratch.plan;
    if (*call.status != 0) return;
    typedef typename T::Bits Bits;
    const bool raw = plan.mode == static_cast<int>(Mode::raw);
    if (!raw && plan.mode != static_cast<int>(Mode::constant)) return;
    const uint8_t* const from = call.payload + (raw ? plan.data : own_begin(call.out.shape.dimensions));
    Bits* const out = static_cast<Bits*>(call.out.data);
    for (int64_t i = first_thread(); i < call.out.n; i += all_threads())
        out[i] = combine<T>(true, out[i], call.scale, get<Bits>(from + (raw ? i * int64_t{sizeof(Bits)} : 0)));
}

}  // namespace
}  // namespace cuda
}  // namespace platonic
