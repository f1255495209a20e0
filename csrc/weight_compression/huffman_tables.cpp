// Tables of the entropy coder from the code lengths.
#include <cstring>

#include "weight_compression/huffman_simd.h"

namespace platonic {

void make_decode_tables(const uint8_t* lengths, int64_t levels, const CanonicalCode& code, DecodeTables* tables) {
    tables->code = code;
    int32_t rank[max_code_length + 2], next[max_code_length + 2];
    memcpy(rank, code.first_rank, sizeof rank);
    memcpy(next, code.first_code, sizeof next);
    memset(tables->symbols, 0, sizeof tables->symbols);
    for (int64_t s = 0; s < levels; ++s) {
        const int length = lengths[s];
        if (length == 0) continue;
        tables->symbols[rank[length]++] = static_cast<uint16_t>(s);
        const int spread = code.longest - length;
        const int32_t first = next[length]++ << spread;
        for (int32_t i = first; i < first + (1 << spread); ++i)
            tables->entries[i] = static_cast<uint16_t>(s << 4 | length);
    }
    for (int i = 0; i < max_code_length; ++i) {
        const int length = code.shortest + 1 + i;
        const uint16_t last =
            length > code.longest ? 0xffff : static_cast<uint16_t>((code.first_code[length] << (16 - length)) - 1);
        for (uint16_t& lane : tables->last_code[i]) lane = last;
        for (int16_t& lane : tables->half_last_code[i]) lane = static_cast<int16_t>(last >> 1);
    }
    memset(tables->rank_offset, 0, sizeof tables->rank_offset);
    for (int length = code.shortest; length <= code.longest; ++length)
        tables->rank_offset[length] = static_cast<uint16_t>(code.first_rank[length] - code.first_code[length]);
    for (int length = 0; length < 16; ++length) {
        tables->offset_bytes[0][length] = static_cast<uint8_t>(tables->rank_offset[length]);
        tables->offset_bytes[1][(length + 8) % 16] = static_cast<uint8_t>(tables->rank_offset[length] >> 8);
    }
    tables->bytes = levels <= 256;
    if (!tables->bytes) return;
    for (int rank = 0; rank < 256; ++rank) {
        const int before = rank % 128 < 16 ? 0 : tables->symbols[rank - 16];
        for (int copy = 0; copy < 32; copy += 16)
            tables->byte_symbols[rank / 16][copy + rank % 16] = static_cast<uint8_t>(tables->symbols[rank] ^ before);
    }
}

void make_encode_tables(const uint8_t* lengths, int64_t levels, const CanonicalCode& code, EncodeTables* tables) {
    int32_t next[max_code_length + 2];
    memcpy(next, code.first_code, sizeof next);
    memset(tables->entries, 0, sizeof tables->entries);
    tables->last = static_cast<int32_t>(levels - 1);
    tables->shortest = code.shortest;
    tables->wrap = code.longest > 13 ? 4 : 8;
    tables->tables = static_cast<int32_t>((levels + 63) / 64);
    for (int k = 0; k < 3; ++k) {
        const int length = code.shortest + tables->wrap * (k + 1);
        tables->long_codes[k] = length > code.longest ? 0xffff : (code.first_code[length] << (16 - length)) - 1;
    }
    for (int64_t s = 0; s < levels; ++s) {
        const int length = lengths[s];
        tables->codes[s] = 0;
        tables->powers[s] = 0x10000;
        if (length == 0) continue;
        const uint32_t c = static_cast<uint32_t>(next[length]++);
        tables->codes[s] = c | static_cast<uint32_t>(length) << 16;
        tables->powers[s] = c | 0x10000u << length;
        if (s < 64 * vector_tables)
            tables->entries[s] = static_cast<uint16_t>(c << (16 - length) |
                                                       static_cast<uint32_t>((length - code.shortest) % tables->wrap));
    }
}

}  // namespace platonic
