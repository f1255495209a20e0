// Code lengths of an optimal length-limited prefix code, and the canonical code that belongs to them.
//
// Canonical: codes ascend with (length, symbol); the first code of length 1 is 0. Lengths determine the code.
#pragma once

#include <cstdint>

#include "common/launch.h"

namespace platonic {

constexpr int64_t max_coded_levels = 4096;  // more levels are packed with a fixed number of bits
constexpr int max_code_length = 14;

// The limit on code lengths for an alphabet of so many symbols. Measured on a Gaussian at 192 levels, over its entropy:
// 11 bits 1.40 %, 12 1.01 %, 13 0.84 %, unlimited 0.70 %.
PLATONIC_HD int length_limit(int64_t levels) { return levels <= 256 ? 13 : 14; }

// lengths[s] of every symbol with counts[s] > 0, at least two of them, by package-merge with the limit
// length_limit(levels); 0 for the others. Among equal weights the lower symbol counts as the smaller, and a symbol as
// smaller than a package: that makes the lengths unique.
void code_lengths(const int64_t* counts, int64_t levels, uint8_t* lengths);

// ---- codes of a sample: one pass over the values less ----

// Before code_lengths, a sample's counts are multiplied by this and 1 is added: symbols that it lacks may be among the
// rest.
constexpr int64_t sample_weight = 64;

// At least so many values: below, the pass is short and the sample small.
constexpr int64_t sample_coded_from = int64_t{1} << 22;

// A sample under a code of its own: its size, its bits, and the part of all codes that belongs to symbols which it
// lacks, in units of 2^-max_code_length. Sums, so in any order.
struct SampleCode {
    int64_t size, bits, unseen;

    PLATONIC_HD void take(int64_t count, int length) {
        size += count;
        bits += count * length;
        if (count == 0) unseen += int64_t{1} << (max_code_length - length);
    }
};

// Bits that n values may take with the code of a sample of them, or -1 if the code of all values has to be expected to
// save more than a thousandth: for the codes of symbols that the sample lacks, and for the noise of the counts. Every
// operation rounds by itself; so do all devices.
PLATONIC_HD int64_t sample_code_bits(const SampleCode& sample, int64_t levels, int64_t n) {
    const double of_one = static_cast<double>(sample.bits) / static_cast<double>(sample.size);
    const double share = static_cast<double>(sample.unseen) / static_cast<double>(1 << max_code_length);
    const double noise = static_cast<double>(levels) / static_cast<double>(2 * sample.size);
    if ((share + noise) * 1.4426950408889634 > of_one * 0.001) return -1;
    return static_cast<int64_t>(of_one * 1.002 * static_cast<double>(n)) + 1;
}

// lengths[s] of the code of a sample of n values, which all symbols have, and sample_code_bits.
int64_t sample_code(const int64_t* counts, int64_t levels, int64_t n, uint8_t* lengths);

// First canonical code and first rank (position among symbols sorted by length, then symbol) of every length.
struct CanonicalCode {
    int32_t first_code[max_code_length + 2];
    int32_t first_rank[max_code_length + 2];
    int32_t shortest, longest, used;
};

// From how many codes there are of every length. False unless the code is complete (sum of 2^-length is 1).
PLATONIC_HD bool make_canonical_from_counts(const int32_t* count, CanonicalCode* code) {
    int32_t next = 0, rank = 0;
    code->shortest = 0;
    code->longest = 0;
    for (int length = 1; length <= max_code_length; ++length) {
        code->first_code[length] = next;
        code->first_rank[length] = rank;
        if (count[length] > 0) {
            if (code->shortest == 0) code->shortest = length;
            code->longest = length;
        }
        next += count[length];
        rank += count[length];
        if (next > (1 << length)) return false;
        if (length < max_code_length) next <<= 1;
    }
    code->used = rank;
    return rank >= 2 && next == (1 << max_code_length);
}

// From lengths; false, too, if one is over max_code_length.
PLATONIC_HD bool make_canonical(const uint8_t* lengths, int64_t levels, CanonicalCode* code) {
    int32_t count[max_code_length + 2] = {0};
    for (int64_t s = 0; s < levels; ++s) {
        if (lengths[s] > max_code_length) return false;
        if (lengths[s] > 0) ++count[lengths[s]];
    }
    return make_canonical_from_counts(count, code);
}

// ---- code lengths as bytes: nibbles, low half first. 0 to 14 is the length of the next symbol; 15, r stands for
// r + 2 symbols of length 0. The last byte's high half may be 0 padding. ----

// Bytes written for `levels` lengths; at most levels / 2 + 1.
PLATONIC_HD int64_t pack_lengths(const uint8_t* lengths, int64_t levels, uint8_t* bytes) {
    int64_t nibbles = 0;
    for (int64_t s = 0; s < levels;) {
        int64_t run = 0;
        while (run < 17 && s + run < levels && lengths[s + run] == 0) ++run;
        const int emit[2] = {run >= 2 ? 15 : lengths[s], static_cast<int>(run - 2)};
        for (int k = 0; k < (run >= 2 ? 2 : 1); ++k, ++nibbles) {
            if (nibbles % 2 == 0)
                bytes[nibbles / 2] = static_cast<uint8_t>(emit[k]);
            else
                bytes[nibbles / 2] = static_cast<uint8_t>(bytes[nibbles / 2] | emit[k] << 4);
        }
        s += run >= 2 ? run : 1;
    }
    return (nibbles + 1) / 2;
}

// False unless exactly `size` bytes describe exactly `levels` lengths.
PLATONIC_HD bool unpack_lengths(const uint8_t* bytes, int64_t size, int64_t levels, uint8_t* lengths) {
    int64_t nibble = 0, s = 0;
    while (s < levels) {
        if (nibble >= 2 * size) return false;
        const int value = bytes[nibble / 2] >> (4 * (nibble % 2)) & 15;
        ++nibble;
        if (value < 15) {
            lengths[s++] = static_cast<uint8_t>(value);
            continue;
        }
        if (nibble >= 2 * size) return false;
        int64_t run = (bytes[nibble / 2] >> (4 * (nibble % 2)) & 15) + 2;
        ++nibble;
        if (run > levels - s) return false;
        while (run-- > 0) lengths[s++] = 0;
    }
    if ((nibble + 1) / 2 != size) return false;
    return nibble % 2 == 0 || bytes[nibble / 2] >> 4 == 0;
}

}  // namespace platonic
