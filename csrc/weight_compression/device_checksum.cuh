// Checksums by a thread block: 256 threads take a message's words in turn, so that loads are coalesced, and multiply
// what they have by x^(32 * 256) from one of their words to the next, four look-ups as in any table-driven CRC.
#pragma once

#include "weight_compression/crc32c_math.h"
#include "weight_compression/device_common.cuh"

namespace platonic {
namespace cuda {
namespace {

__device__ constexpr Crc32cTables crc32c_tables = make_crc32c_tables();

// Of `size` bytes; in all threads of a block of crc32c_threads. Nothing outside of them is read.
__device__ inline uint32_t checksum_block(const uint8_t* bytes, int64_t size) {
    constexpr int threads = crc32c_threads;
    __shared__ uint32_t turn[4][256];
    __shared__ uint32_t sums[threads / 32];
    const int t = threadIdx.x;
    __syncthreads();  // of an earlier call
    for (int i = t; i < 4 * 256; i += threads) turn[i / 256][i % 256] = crc32c_tables.turn[i / 256][i % 256];
    __syncthreads();
    uint32_t crc = 0xffffffffu;
    if (size < 4) {
        for (int64_t i = 0; i < size; ++i) crc = crc32c_byte(crc, bytes[i]);
        return ~crc;
    }
    // Zeros in front of a message change nothing but the initial register, which is put into the first four bytes
    // instead: turns end with the message.
    const int64_t turns = (size + 4 * threads - 1) / (4 * threads);
    const uint8_t *end = bytes + size, *p = end - 4 * (turns * threads - t);
    const auto word_at = [&](const uint8_t* place) {
        const int64_t offset = place - bytes;
        if (offset <= -4) return 0u;
        const uint32_t word = load_word(place, bytes, end);
        if (offset >= 4) return word;
        return word ^ (offset < 0 ? 0xffffffffu << (-8 * offset) : 0xffffffffu >> (8 * offset));
    };
    uint32_t sum = 0, coming = word_at(p);
    for (int64_t i = 0; i < turns; ++i, p += 4 * threads) {
        const uint32_t word = coming;
        if (i + 1 < turns) coming = word_at(p + 4 * threads);  // on its way while this one is looked up
        sum = turn[0][sum & 255] ^ turn[1][sum >> 8 & 255] ^ turn[2][sum >> 16 & 255] ^ turn[3][sum >> 24] ^ word;
    }
    sum = crc32c_multiply(sum, crc32c_tables.from_end[t]);
    for (int apart = 16; apart > 0; apart /= 2) sum ^= __shfl_xor_sync(full_warp, sum, apart);
    if (t % 32 == 0) sums[t / 32] = sum;
    __syncthreads();
    crc = 0;
    for (int w = 0; w < threads / 32; ++w) crc ^= sums[w];
    return ~crc;
}

}  // namespace
}  // namespace cuda
}  // namespace platonic
