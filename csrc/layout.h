// How weights, activations and keys/values lie in memory. No code that computes.
//
// Letters: T rows of activations, O outputs of a linear layer, K inputs (columns), G key/value
// heads, D head size. A *panel* is 16 output rows interleaved, so that the lanes of a vector are
// outputs and no kernel ever adds across lanes: a row's sum has one fixed order on every ISA, for
// every number of rows and threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pronk {

constexpr int kPanel = 16;       // output rows interleaved
constexpr int kBlock = 32;       // inputs that share a scale (some formats: half of that)
constexpr int kSuper = 256;      // inputs of a K-quant super-block
constexpr int kGroups = 8;       // groups of 4 inputs in a block: what one 4-way dot product eats
constexpr int kKvBlock = 32;     // positions of a key/value block; backends/protocol.py: BLOCK
constexpr int kKvPartition = 8;  // key/value blocks that are summed before partial sums are merged

// Tensor kinds as files store them; the numbers are GGML's.
enum class Kind : int {
    F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11,
    Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20, IQ4_XS = 23, BF16 = 30, TQ1_0 = 34, TQ2_0 = 35,
    MXFP4 = 39, Q1_0 = 41,
};

// Packed layouts. Dense ones are [K][16]. In the others a panel is a run of blocks; each block is
// a header, then codes. `c[g][r][i]` is the unsigned code of row r, input 4g+i, zero point added.
//
//   nibbles   4 lines of 64 bytes; line j holds c[j] in the low and c[j+4] in the high halves
//   bit plane 1 line of 64 bytes; bit g of byte 4r+i is bit 4 of c[g][r][i]
//   pair plane 2 lines; bits 2(g/2), 2(g/2)+1 of byte 4r+i of line g%2 are bits 4, 5 of c[g][r][i]
//   bytes     8 lines, c as it is
//
//   Q4   f16 d[16], nibbles, zero 8                                    (Q4_0)
//   Q4M  f16 d[16], f16 m[16], nibbles                                 (Q4_1)
//   Q4K  per 8 blocks f16 d[16], f16 dmin[16]; u8 sc[16], u8 m[16], nibbles        (Q4_K)
//   Q5K  the same with a bit plane                                     (Q5_K)
//   Q6K  per 8 blocks f16 d[16]; i8 sc[2][16], nibbles, pair plane, zero 32        (Q6_K)
//   Q8   f16 d[16], bytes, zero 128                                    (Q8_0)
//   I8   f32 d[16], bytes, zero 128; M: f32 m[16] too; S: scales of 16 inputs, [2][16]
enum class Pack : int { F32, F16, BF16, Q4, Q4M, Q4K, Q5K, Q6K, Q8, I8, I8M, I8S, I8SM };

struct PackInfo {
    bool dense;
    int super_bytes;  // header of 8 blocks
    int head_bytes;   // header of a block
    int code_bytes;   // codes of a block; dense: bytes of one weight
    int zero;         // zero point that the codes carry
    int scales;       // scales of a block and row
    bool mins;
};

static constexpr PackInfo pack_info(Pack pack) {
    switch (pack) {
        case Pack::F32: return {true, 0, 0, 4, 0, 0, false};
        case Pack::F16: return {true, 0, 0, 2, 0, 0, false};
        case Pack::BF16: return {true, 0, 0, 2, 0, 0, false};
        case Pack::Q4: return {false, 0, 32, 256, 8, 1, false};
        case Pack::Q4M: return {false, 0, 64, 256, 0, 1, true};
        case Pack::Q4K: return {false, 64, 32, 256, 0, 1, true};
        case Pack::Q5K: return {false, 64, 32, 256 + 64, 0, 1, true};
        case Pack::Q6K: return {false, 32, 32, 256 + 128, 32, 2, false};
        case Pack::Q8: return {false, 0, 32, 512, 128, 1, false};
        case Pack::I8: return {false, 0, 64, 512, 128, 1, false};
        case Pack::I8M: return {false, 0, 128, 512, 128, 1, true};
        case Pack::I8S: return {false, 0, 128, 512, 128, 2, false};
        case Pack::I8SM: return {false, 0, 256, 512, 128, 2, true};
    }
    return {};
}

// Bytes of one panel over K inputs.
static constexpr size_t panel_bytes(Pack pack, int64_t k) {
    const PackInfo info = pack_info(pack);
    if (info.dense) return size_t(k) * kPanel * info.code_bytes;
    const int64_t blocks = k / kBlock;
    size_t bytes = size_t(blocks) * (info.head_bytes + info.code_bytes);
    if (info.super_bytes) bytes += size_t(blocks / 8) * info.super_bytes;
    return bytes;
}

// Offset of block b within its panel (of its codes' header; a super header precedes block 0 of 8).
static constexpr size_t block_offset(Pack pack, int64_t b) {
    const PackInfo info = pack_info(pack);
    size_t offset = size_t(b) * (info.head_bytes + info.code_bytes);
    if (info.super_bytes) offset += size_t(b / 8 + 1) * info.super_bytes;
    return offset;
}

// What a block of 32 activations x contributes beside its integers q: x is about (q + r/256) * scale,
// q and r being bytes. Most blocks have no fine part r; see quantize_row.
struct RowBlock {
    float scale, sum;            // of x as rounded
    int16_t q_sum, q_first;      // sums of q: all 32, the first 16
    int16_t fine_sum, fine_first;  // the same of r
};
constexpr int16_t kNoFine = -32768;  // as fine_sum, whose magnitude is at most 4096

// Quantized rows. A span is kSpan blocks of every row, one row after another, so that a kernel that
// works its way along the inputs reads one run of memory, rows a known distance apart. The last span
// has room for as many blocks as the others.
constexpr int kSpan = 8;
constexpr int kSpanInputs = kSpan * kBlock;

static constexpr int64_t spans_of(int64_t k) { return (k + kSpanInputs - 1) / kSpanInputs; }

constexpr int64_t kMaxRows = 512;  // of one pass of a linear layer: bounds the scratch

constexpr int kGroupPanels = 4;     // panels of one call of linear_group, at most
constexpr int kGroupRows = kGroupPanels * kPanel;

struct QuantizedRows {
    const int8_t *q, *fine;     // [spans][rows][256]
    const RowBlock* blocks;     // [spans][rows][8]
    const uint16_t* fine_rows;  // [spans][8][rows]: which rows have a fine part in a block
    const int32_t* fine_count;  // [spans][8]: how many
    int64_t rows, k;
};

}  // namespace pronk
