// What measuring, encoding and decoding on the CPU share: how tensors are cut, and buffers of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "weight_compression/huffman_simd.h"
#include "weight_compression/stream.h"

namespace platonic {
namespace cpu {

constexpr int64_t segment = 1 << 20;  // values of a task that only reads
constexpr int64_t chunk = chunk_rows * stream_lanes;

inline int64_t pieces(int64_t n, int64_t size) { return n / size + (n % size != 0); }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t symbols_of_block(int64_t n, int64_t block) { return smaller(block_symbols, n - block * block_symbols); }

// Memory of a thread that outlives the call: what a task needs would cost more to ask for than to fill. Uses that
// overlap need slots of their own.
template <class T, int slot>
T* thread_buffer(int64_t size) {
    thread_local std::vector<T> buffer;
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
}

}  // namespace cpu
}  // namespace platonic
