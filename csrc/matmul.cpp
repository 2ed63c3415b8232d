// y = x W^T for packed weights. Compiled once for each instruction set.
//
// Most of the running time is spent here. Decoding one row reads every weight once and is bound by
// memory; many rows are bound by the 4-way int8 dot product. Both do the same arithmetic in the same
// order for every single output,
//     sum = fma(float(integer sum of a block), weight scale * activation scale, sum)
// block after block, so a row's numbers do not depend on how many rows come with it.
#include "kernels.h"
#include "simd.h"

namespace pronk::PRONK_ISA {
namespace {

// Register tile: kTileRows rows by kVectors vectors of W outputs.
#if defined(__AVX512VNNI__)
constexpr int kTileRows = 3, kVectors = 4, kDenseRows = 6;
#elif defined(__AVX2__)
constexpr int kTileRows = 2, kVectors = 2, kDenseRows = 4;
#else
constexpr int kTileRows = 1, kVectors = 4, kDenseRows = 2;
#endif
constexpr int kPerPanel = kPanel / W;               // vectors of a panel
constexpr int kGroupPanels = kVectors > kPerPanel ? kVectors / kPerPanel : 1;
constexpr int kGroupRows = kGroupPanels * kPanel;   // outputs that a task's inner loop covers
constexpr int kChunkBlocks = 8;                     // blocks decoded at a time: fits the L1 cache
constexpr int kDenseChunk = 64;                     // inputs summed before they join the total
constexpr int kDirectRows = kTileRows;              // up to here codes are decoded in registers

template <Pack P>
constexpr bool kSmallCodes = pack_info(P).code_bytes < 512;

// Codes of group g, vector h of a panel.
template <Pack P>
PRONK_INLINE vb codes(const uint8_t* p, int h, int g) {
    if constexpr (pack_info(P).code_bytes == 512) {
        return load<vb>(p + g * 64 + h * W * 4);
    } else {
        vb v = load<vb>(p + (g & 3) * 64 + h * W * 4);
        v = (g < 4 ? v : shift_right(v, 4)) & 0x0f;
        if constexpr (P == Pack::Q5K) {
            const vb plane = load<vb>(p + 256 + h * W * 4);
            v |= (g < 4 ? shift_left(plane, 4 - g) : shift_right(plane, g - 4)) & 0x10;
        }
        if constexpr (P == Pack::Q6K) {
            const vb plane = load<vb>(p + 256 + (g & 1) * 64 + h * W * 4);
            const int shift = 2 * (g / 2);
            v |= (shift < 4 ? shift_left(plane, 4 - shift) : shift_right(plane, shift - 4)) & 0x30;
        }
        return v;
    }
}

// Scales and minimums of vector h of a block: weight = (code - zero) * scale + min.
template <Pack P>
struct BlockScales {
    static constexpr int kScales = pack_info(P).scales;
    vf scale[kScales], min[pack_info(P).mins ? kScales : 0];
};

template <Pack P>
PRONK_INLINE BlockScales<P> block_scales(const uint8_t* super, const uint8_t* head, int h) {
    const auto f16 = [&](const uint8_t* p, int array) {
        return load_f16(reinterpret_cast<const uint16_t*>(p) + array * kPanel + h * W);
    };
    const auto f32 = [&](int array) {
        return load_f32(reinterpret_cast<const float*>(head) + array * kPanel + h * W);
    };
    BlockScales<P> s;
    if constexpr (P == Pack::Q4 || P == Pack::Q8) {
        s.scale[0] = f16(head, 0);
    } else if constexpr (P == Pack::Q4M) {
        s.scale[0] = f16(head, 0);
        s.min[0] = f16(head, 1);
    } else if constexpr (P == Pack::Q4K || P == Pack::Q5K) {
        s.scale[0] = f16(super, 0) * load_u8(head + h * W);
        s.min[0] = -(f16(super, 1) * load_u8(head + kPanel + h * W));
    } else if constexpr (P == Pack::Q6K) {
        const vf d = f16(super, 0);
        for (int sub = 0; sub < 2; ++sub)
            s.scale[sub] = d * load_i8(reinterpret_cast<const int8_t*>(head) + sub * kPanel + h * W);
    } else {
        constexpr PackInfo info = pack_info(P);
        for (int sub = 0; sub < info.scales; ++sub) {
            s.scale[sub] = f32(sub);
            if (info.mins) s.min[sub] = f32(info.scales + sub);
        }
    }
    return s;
}

// One row's share of a block: what the activations contribute.
struct BlockRow {
    int32_t sum[2];
    float scale, fsum[2];
};

template <Pack P>
PRONK_INLINE BlockRow block_row(const QuantizedRows& a, int64_t t, int64_t b) {
    const int64_t blocks = a.k / kBlock;
    const int32_t* sums = a.sums + (t * blocks + b) * 2;
    const float* fsums = a.fsums + (t * blocks + b) * 2;
    BlockRow row{};
    row.scale = a.scales[t * blocks + b];
    if constexpr (pack_info(P).scales == 2) {
        row.sum[0] = sums[0], row.sum[1] = sums[1];
        row.fsum[0] = fsums[0], row.fsum[1] = fsums[1];
    } else {
        row.sum[0] = sums[0] + sums[1];
        row.fsum[0] = fsums[0] + fsums[1];
    }
    return row;
}

template <Pack P>
PRONK_INLINE vf add_block(vf total, const vi* isum, const BlockScales<P>& s, const BlockRow& row) {
    constexpr PackInfo info = pack_info(P);
#pragma GCC unroll 2
    for (int sub = 0; sub < info.scales; ++sub) {
        total = fma(to_float(isum[sub]), s.scale[sub] * row.scale, total);
        if constexpr (info.mins) total = fma(s.min[sub], splat(row.fsum[sub]), total);
    }
    return total;
}

PRONK_INLINE int32_t dword(const int8_t* p) {
    int32_t a;
    std::memcpy(&a, p, 4);
    return a;
}

// Adds codes times one byte of the activations (x[m]: 32 of a row) to a tile's integer sums.
template <Pack P, int MR, int NV, class Code>
PRONK_INLINE void dot_block(const int8_t* const (&x)[MR], Code&& code, vi (&isum)[MR][NV][pack_info(P).scales]) {
    constexpr int kHalf = kGroups / pack_info(P).scales;
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
        vb c[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) c[v] = code(v, g);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v)
                isum[m][v][g / kHalf] = dot4_of<kSmallCodes<P>>(isum[m][v][g / kHalf], c[v], dword(x[m] + 4 * g));
    }
}

// A tile of MR rows by NV vectors over one block: `code(v, g)` yields codes, `scales(v)` scales.
template <Pack P, bool kWide, int MR, int NV, class Code, class Scale>
PRONK_INLINE void tile_block(const QuantizedRows& a, int64_t t0, int64_t b, Code&& code, Scale&& scales,
                             vf (&total)[MR][NV]) {
    constexpr PackInfo info = pack_info(P);
    vi isum[MR][NV][info.scales];
    BlockRow row[MR];
    const int8_t* x[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
        row[m] = block_row<P>(a, t0 + m, b);
        x[m] = a.high + (t0 + m) * a.k + b * kBlock;
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v)
#pragma GCC unroll 2
            for (int sub = 0; sub < info.scales; ++sub)
                isum[m][v][sub] = kWide ? vi{} : splat(-info.zero * row[m].sum[sub]);
    }
    dot_block<P, MR, NV>(x, code, isum);
    if constexpr (kWide) {
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
            x[m] += a.low - a.high;
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v)
#pragma GCC unroll 2
                for (int sub = 0; sub < info.scales; ++sub)
                    isum[m][v][sub] = (isum[m][v][sub] << 8) - info.zero * row[m].sum[sub];
        }
        dot_block<P, MR, NV>(x, code, isum);
    }
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
        const BlockScales<P> s = scales(v);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) total[m][v] = add_block<P>(total[m][v], isum[m][v], s, row[m]);
    }
}

// Rows t0..t0+MR of NV vectors, straight from the packed codes. out [MR][kGroupRows].
template <Pack P, bool kWide, int MR, int NV>
void tile_direct(const QuantizedRows& a, int64_t t0, const uint8_t* panel, size_t stride, float* out) {
    constexpr PackInfo info = pack_info(P);
    vf total[MR][NV] = {};
    const int64_t blocks = a.k / kBlock;
    const uint8_t* super = panel;
    const uint8_t* head = panel;
    for (int64_t b = 0; b < blocks; ++b) {
        if constexpr (info.super_bytes > 0) {
            if (b % 8 == 0) super = head, head += info.super_bytes;
        }
        const uint8_t* body = head + info.head_bytes;
        // the hardware prefetcher stops at each page; past these panels the next ones follow
        constexpr int kAhead = 1024, kPanels = NV / kPerPanel;
        const uint8_t* ahead = head + kAhead;
        if (ahead >= panel + stride) ahead += (kPanels - 1) * stride;
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 10
            for (int line = 0; line < info.head_bytes + info.code_bytes; line += 64)
                __builtin_prefetch(ahead + p * stride + line);
        tile_block<P, kWide, MR, NV>(
            a, t0, b, [&](int v, int g) { return codes<P>(body + v / kPerPanel * stride, v % kPerPanel, g); },
            [&](int v) {
                const size_t offset = v / kPerPanel * stride;
                return block_scales<P>(super + offset, head + offset, v % kPerPanel);
            },
            total);
        head = body + info.code_bytes;
    }
    for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v) store(out + m * kGroupRows + v * W, total[m][v]);
}

// A chunk of blocks of up to kGroupPanels panels, decoded once and reused by all rows.
template <Pack P>
struct Decoded {
    alignas(64) uint8_t codes[kGroupPanels][kChunkBlocks][kGroups * 64];
    BlockScales<P> scales[kGroupPanels * kPerPanel][kChunkBlocks];
};

template <Pack P>
void decode_chunk(const uint8_t* panel, size_t stride, int panels, int64_t b0, int n, Decoded<P>& out) {
    constexpr PackInfo info = pack_info(P);
    for (int p = 0; p < panels; ++p) {
        for (int i = 0; i < n; ++i) {
            const uint8_t* head = panel + p * stride + block_offset(P, b0 + i);
            const uint8_t* super = panel + p * stride + block_offset(P, (b0 + i) / 8 * 8) - info.super_bytes;
            const uint8_t* body = head + info.head_bytes;
#pragma GCC unroll 4
            for (int h = 0; h < kPerPanel; ++h) {
#pragma GCC unroll 8
                for (int g = 0; g < kGroups; ++g)
                    store(out.codes[p][i] + g * 64 + h * W * 4, codes<P>(body, h, g));
                out.scales[p * kPerPanel + h][i] = block_scales<P>(super, head, h);
            }
        }
    }
}

// Adds a decoded chunk to rows t0..t0+MR of the totals [MR][kGroupRows].
template <Pack P, bool kWide, int MR, int NV>
PRONK_INLINE void tile_decoded(const QuantizedRows& a, int64_t t0, const Decoded<P>& chunk, int v0, int64_t b0,
                               int n, bool first, float* out) {
    vf total[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) total[m][v] = first ? vf{} : load_f32(out + m * kGroupRows + (v0 + v) * W);
    for (int i = 0; i < n; ++i)
        tile_block<P, kWide, MR, NV>(
            a, t0, b0 + i,
            [&](int v, int g) {
                return load<vb>(chunk.codes[(v0 + v) / kPerPanel][i] + g * 64 + (v0 + v) % kPerPanel * W * 4);
            },
            [&](int v) { return chunk.scales[v0 + v][i]; }, total);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(out + m * kGroupRows + (v0 + v) * W, total[m][v]);
}

template <Pack P, bool kWide, int NV>
void rows_decoded(const QuantizedRows& a, int64_t rows, const Decoded<P>& chunk, int v0, int64_t b0, int n,
                  float* out) {
    const bool first = b0 == 0;
    int64_t t = 0;
    for (; t + kTileRows <= rows; t += kTileRows)
        tile_decoded<P, kWide, kTileRows, NV>(a, t, chunk, v0, b0, n, first, out + t * kGroupRows);
    if constexpr (kTileRows > 2) {
        if (rows - t == 2) {
            tile_decoded<P, kWide, 2, NV>(a, t, chunk, v0, b0, n, first, out + t * kGroupRows);
            t += 2;
        }
    }
    for (; t < rows; ++t) tile_decoded<P, kWide, 1, NV>(a, t, chunk, v0, b0, n, first, out + t * kGroupRows);
}

template <Pack P, bool kWide, int NV>
void rows_direct(const QuantizedRows& a, int64_t rows, const uint8_t* panel, size_t stride, float* out) {
    static_assert(kDirectRows <= 3);
    if (rows == 1) tile_direct<P, kWide, 1, NV>(a, 0, panel, stride, out);
    if constexpr (kDirectRows > 1) {
        if (rows == 2) tile_direct<P, kWide, 2, NV>(a, 0, panel, stride, out);
    }
    if constexpr (kDirectRows > 2) {
        if (rows == 3) tile_direct<P, kWide, 3, NV>(a, 0, panel, stride, out);
    }
}

// kGroupRows outputs (`panels` panels of them are there) of all rows. out [rows][kGroupRows].
template <Pack P, bool kWide>
void group_outputs(const QuantizedRows& a, int64_t rows, const uint8_t* panel, int panels, float* out) {
    const size_t stride = panel_bytes(P, a.k);
    if (rows <= kDirectRows) {
        if (panels == kGroupPanels) return rows_direct<P, kWide, kVectors>(a, rows, panel, stride, out);
        for (int p = 0; p < panels; ++p)
            rows_direct<P, kWide, kPerPanel>(a, rows, panel + p * stride, stride, out + p * kPanel);
        return;
    }
    Decoded<P> chunk;
    const int64_t blocks = a.k / kBlock;
    for (int64_t b0 = 0; b0 < blocks; b0 += kChunkBlocks) {
        const int n = int(blocks - b0 < kChunkBlocks ? blocks - b0 : kChunkBlocks);
        decode_chunk<P>(panel, stride, panels, b0, n, chunk);
        if (panels == kGroupPanels) {
            rows_decoded<P, kWide, kVectors>(a, rows, chunk, 0, b0, n, out);
        } else {
            for (int p = 0; p < panels; ++p)
                rows_decoded<P, kWide, kPerPanel>(a, rows, chunk, p * kPerPanel, b0, n, out);
        }
    }
}

template <Pack P>
void group_quantized(const LinearInputs& in, const uint8_t* panel, int panels, float* out) {
    if (in.quantized.low) return group_outputs<P, true>(in.quantized, in.rows, panel, panels, out);
    group_outputs<P, false>(in.quantized, in.rows, panel, panels, out);
}

// ---- dense weights: float32 products, inputs in chunks of kDenseChunk --------------------------

template <Pack P>
PRONK_INLINE vf dense_load(const uint8_t* p, int64_t index) {
    if constexpr (P == Pack::F32) return load_f32(reinterpret_cast<const float*>(p) + index);
    if constexpr (P == Pack::F16) return load_f16(reinterpret_cast<const uint16_t*>(p) + index);
    return load_bf16(reinterpret_cast<const uint16_t*>(p) + index);
}

// Adds n inputs to rows of the totals: `panel_of(p)` is panel p's data at the chunk's first input.
template <Pack P, int MR, int NV, class PanelOf>
PRONK_INLINE void dense_tile(const float* x, int64_t k, int n, PanelOf&& panel_of, int v0, bool first, float* out) {
    vf sum[MR][NV] = {};
    for (int i = 0; i < n; ++i) {
        vf w[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v)
            w[v] = dense_load<P>(panel_of((v0 + v) / kPerPanel), i * kPanel + (v0 + v) % kPerPanel * W);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[m][v] = fma(w[v], splat(x[m * k + i]), sum[m][v]);
    }
    for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v) {
            float* to = out + m * kGroupRows + (v0 + v) * W;
            store(to, first ? sum[m][v] : load_f32(to) + sum[m][v]);
        }
}

template <Pack P, int NV, class PanelOf>
void dense_rows(const float* x, int64_t rows, int64_t k, int n, PanelOf&& panel_of, int v0, bool first, float* out) {
    int64_t t = 0;
    for (; t + kDenseRows <= rows; t += kDenseRows)
        dense_tile<P, kDenseRows, NV>(x + t * k, k, n, panel_of, v0, first, out + t * kGroupRows);
    for (; t + 2 <= rows; t += 2)
        dense_tile<P, 2, NV>(x + t * k, k, n, panel_of, v0, first, out + t * kGroupRows);
    if (t < rows) dense_tile<P, 1, NV>(x + t * k, k, n, panel_of, v0, first, out + t * kGroupRows);
}

template <Pack P>
void group_dense(const float* x, int64_t rows, int64_t k, const uint8_t* panel, int panels, float* out) {
    const size_t stride = panel_bytes(P, k), width = pack_info(P).code_bytes;
    for (int64_t k0 = 0; k0 < k; k0 += kDenseChunk) {
        const int n = int(k - k0 < kDenseChunk ? k - k0 : kDenseChunk);
        const auto panel_of = [&](int p) { return panel + p * stride + k0 * kPanel * width; };
        if (panels == kGroupPanels) {
            dense_rows<P, kVectors>(x + k0, rows, k, n, panel_of, 0, k0 == 0, out);
        } else {
            for (int p = 0; p < panels; ++p)
                dense_rows<P, kPerPanel>(x + k0, rows, k, n, panel_of, p * kPerPanel, k0 == 0, out);
        }
    }
}

}  // namespace

extern const int group_rows;
const int group_rows = kGroupRows;

void linear_group(Pack pack, const LinearInputs& in, const uint8_t* panel, int panels, float* out) {
    switch (pack) {
        case Pack::F32: return group_dense<Pack::F32>(in.x, in.rows, in.k, panel, panels, out);
        case Pack::F16: return group_dense<Pack::F16>(in.x, in.rows, in.k, panel, panels, out);
        case Pack::BF16: return group_dense<Pack::BF16>(in.x, in.rows, in.k, panel, panels, out);
        case Pack::Q4: return group_quantized<Pack::Q4>(in, panel, panels, out);
        case Pack::Q4M: return group_quantized<Pack::Q4M>(in, panel, panels, out);
        case Pack::Q4K: return group_quantized<Pack::Q4K>(in, panel, panels, out);
        case Pack::Q5K: return group_quantized<Pack::Q5K>(in, panel, panels, out);
        case Pack::Q6K: return group_quantized<Pack::Q6K>(in, panel, panels, out);
        case Pack::Q8: return group_quantized<Pack::Q8>(in, panel, panels, out);
        case Pack::I8: return group_quantized<Pack::I8>(in, panel, panels, out);
        case Pack::I8M: return group_quantized<Pack::I8M>(in, panel, panels, out);
        case Pack::I8S: return group_quantized<Pack::I8S>(in, panel, panels, out);
        case Pack::I8SM: return group_quantized<Pack::I8SM>(in, panel, panels, out);
    }
}

void quantize_row(const float* x, int64_t k, int8_t* high, int8_t* low, float* scales, int32_t* sums, float* fsums) {
    const float levels = low ? 127.0f * 256.0f : 127.0f;
    for (int64_t b = 0; b < k / kBlock; ++b) {
        const Rounding rounding = rounding_of(x + b * kBlock, kBlock, levels);
        scales[b] = rounding.scale;
        for (int half = 0; half < 2; ++half) {
            vi sum{};
            for (int64_t i = b * kBlock + half * 16; i < b * kBlock + half * 16 + 16; i += W) {
                const vi q = round_to_int(x + i, rounding);
                const vi top = low ? (q + 128) >> 8 : q;
                store(high + i, __builtin_convertvector(top, vc));
                if (low) store(low + i, __builtin_convertvector(q - (top << 8), vc));
                sum += q;
            }
            int32_t total = 0;
            for (int lane = 0; lane < W; ++lane) total += sum[lane];
            sums[2 * b + half] = total;
            fsums[2 * b + half] = float(total) * scales[b];
        }
    }
}

}  // namespace pronk::PRONK_ISA
