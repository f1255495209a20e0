// How a block of symbols becomes bytes: 16 lanes in lockstep over one stream of 16-bit words.
//
// Symbol i of a block belongs to lane i % 16 and row i / 16. A lane holds between 16 and 31 bits, most significant
// first. The decoder takes a row's symbols off the tops of the lanes; after a row, each lane that is left with fewer
// than 16 bits takes the next word of the stream, lower lanes first. The encoder is the exact inverse and runs from
// the last row to the first: every lane begins with 16 zero bits, and before a code is put on top, a lane that would
// reach 32 bits gives its lowest 16 away. A code has at most 14 bits, so one word per lane and row is enough.
//
//   bytes of a block:  16 x uint32, a lane's bits at the start of the block under a leading 1
//                      uint16 words in the order in which the decoder takes them
//
// After the last row every lane holds 16 zero bits again and all words are taken: the decoder checks both. One word
// stream per block keeps reads of all lanes together (a half warp on a GPU, half a vector on a CPU), and needs no
// table of lane lengths. Measured against a level-ordered (wavelet-like) layout on AVX-512 without VBMI2, one core:
// 0.4 ns a symbol and level there, 2.4 ns a symbol of 6.3 bits; here 0.5 ns.
#pragma once

#include <cstdint>

#include "common/launch.h"

namespace platonic {

constexpr int stream_lanes = 16;
constexpr int64_t block_symbols = 65536;  // of every block but the last
constexpr int64_t block_state_bytes = 4 * stream_lanes;
// A block's bytes at most: 14 bits a symbol, and 16 bits a lane at the end.
constexpr int64_t max_block_bytes = block_state_bytes + 2 * stream_lanes + block_symbols / 8 * 14;

PLATONIC_HD int64_t block_count(int64_t n) { return n / block_symbols + (n % block_symbols != 0); }

// Not less than the bytes of all blocks of n symbols whose codes have so many bits together: a lane of b bits has 32
// bits of state and b / 16 words, rounded down.
PLATONIC_HD int64_t coded_bytes_bound(int64_t n, int64_t bits) {
    return block_count(n) * block_state_bytes + (bits + 7) / 8;
}

}  // namespace platonic
