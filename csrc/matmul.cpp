// y = x W^T for packed weights. Compiled once for each instruction set.
//
// Most of the running time is spent here. A few rows read every weight once and are bound by memory;
// many rows are bound by the 4-way int8 dot product. All do the same arithmetic in the same order
// for every single output,
//     sum = fma(float(integer sum of a block), weight scale * activation scale, sum)
// block after block, so a row's numbers do not depend on how many rows come with it.
#include "kernels.h"
#include "simd.h"

namespace pronk::PRONK_ISA {
namespace {

// Register tiles, rows by vectors of W outputs. A few rows take kFewVectors at a time, streaming
// their panels from memory; more rows take kVectors at a time and go over a span of panels, which
// stays in the L1 cache, again and again.
#if defined(PRONK_VNNI_512)
constexpr int kUnrolledGroups = 8;
constexpr int kFewRows = 3, kFewVectors = 4, kTileRows = 5, kVectors = 2, kFineRows = 4, kDenseRows = 6;
#elif defined(PRONK_X86)
constexpr int kUnrolledGroups = 8;
constexpr int kFewRows = 2, kFewVectors = 4, kTileRows = 4, kVectors = 2, kFineRows = 4, kDenseRows = 4;
#elif defined(PRONK_DOTPROD)
constexpr int kUnrolledGroups = 8;
constexpr int kFewRows = 2, kFewVectors = 4, kTileRows = 3, kVectors = 4, kFineRows = 2, kDenseRows = 4;
#else
constexpr int kUnrolledGroups = 1;  // dot4 takes dozens of instructions here: all groups would take minutes to compile
constexpr int kFewRows = 1, kFewVectors = 4, kTileRows = 2, kVectors = 4, kFineRows = 2, kDenseRows = 2;
#endif
constexpr int kPerPanel = kPanel / W;  // vectors of a panel
constexpr int kDenseVectors = kFewVectors;
constexpr int kDenseChunk = 64;        // inputs summed before they join the total

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

// The sum of the first 16 inputs of a block.
PRONK_INLINE float first_of(const RowBlock& row) {
    const float fine = row.fine_sum == kNoFine ? 0.0f : float(row.fine_first);
    return (float(row.q_first) + fine * 0.00390625f) * row.scale;
}

// Adds the integer sums of one block to a total.
template <Pack P>
PRONK_INLINE vf add_block(vf total, const vi* isum, const BlockScales<P>& s, const RowBlock& row) {
    constexpr PackInfo info = pack_info(P);
    const float first = info.mins && info.scales == 2 ? first_of(row) : 0.0f;
    const float x_sum[2] = {info.scales == 1 ? row.sum : first, row.sum - first};
#pragma GCC unroll 2
    for (int sub = 0; sub < info.scales; ++sub) {
        total = fma(to_float(isum[sub]), s.scale[sub] * row.scale, total);
        if constexpr (info.mins) total = fma(s.min[sub], splat(x_sum[sub]), total);
    }
    return total;
}

// The same for the fine parts, which count 1/256; minimums are in already.
template <Pack P>
PRONK_INLINE vf add_fine(vf total, const vi* isum, const BlockScales<P>& s, const RowBlock& row) {
    for (int sub = 0; sub < pack_info(P).scales; ++sub)
        total = fma(to_float(isum[sub]), s.scale[sub] * (row.scale * 0.00390625f), total);
    return total;
}

PRONK_INLINE int32_t dword(const int8_t* p) {
    int32_t a;
    std::memcpy(&a, p, 4);
    return a;
}

// Integer sums of a tile: `start(m, sub)` plus codes times 32 bytes of row m, which are at `x(m)`.
template <Pack P, int MR, int NV, class X, class Code, class Start>
PRONK_INLINE void dot_fours(X&& x, Code&& code, Start&& start, vi (&isum)[MR][NV][pack_info(P).scales]) {
    constexpr int kHalf = kGroups / pack_info(P).scales;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v)
            for (int sub = 0; sub < pack_info(P).scales; ++sub) isum[m][v][sub] = start(m, sub);
    const auto sum = [&](int sub) __attribute__((always_inline)) {
#pragma GCC unroll kUnrolledGroups
        for (int g = sub * kHalf; g < (sub + 1) * kHalf; ++g) {
            vb c[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) c[v] = code(v, g);
#pragma GCC unroll 8
            for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) {
                    vi& to = isum[m][v][sub];
                    to = kSmallCodes<P> ? dot4_small(to, c[v], dword(x(m) + 4 * g)) : dot4(to, c[v], dword(x(m) + 4 * g));
                }
        }
    };
    sum(0);
    if constexpr (pack_info(P).scales == 2) sum(1);
}

#if defined(PRONK_MADDUBS)
// Groups of small codes whose products fit into 16 bits together: 2 * 15 * 128 * 8 and so on.
template <Pack P>
constexpr int kGroupsIn16Bits = P == Pack::Q6K ? 2 : P == Pack::Q5K ? 4 : 8;

// The same for small codes. Sums of 32 bits begin when those of 16 are done: there are few registers.
template <Pack P, int MR, int NV, class X, class Code, class Start>
PRONK_INLINE void dot_pairs(X&& x, Code&& code, Start&& start, vi (&isum)[MR][NV][pack_info(P).scales]) {
    constexpr int kHalf = kGroups / pack_info(P).scales, kTogether = kGroupsIn16Bits<P>;
#pragma GCC unroll 8
    for (int g0 = 0; g0 < kGroups; g0 += kTogether) {
        vs pairs[MR][NV] = {};
#pragma GCC unroll 8
        for (int g = g0; g < g0 + kTogether; ++g) {
            vb c[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) c[v] = code(v, g);
#pragma GCC unroll 8
            for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) pairs[m][v] += multiply_pairs(c[v], dword(x(m) + 4 * g));
        }
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
                const vi before = g0 % kHalf ? isum[m][v][g0 / kHalf] : start(m, g0 / kHalf);
                isum[m][v][g0 / kHalf] = before + add_pairs(pairs[m][v]);
            }
    }
}
#endif

template <Pack P, int MR, int NV, class X, class Code, class Start>
PRONK_INLINE void dot_block(X&& x, Code&& code, Start&& start, vi (&isum)[MR][NV][pack_info(P).scales]) {
#if defined(PRONK_MADDUBS)
    if constexpr (kSmallCodes<P>)
        dot_pairs<P, MR, NV>(x, code, start, isum);
    else
#endif
        dot_fours<P, MR, NV>(x, code, start, isum);
}

// Rows of a tile over one span.
struct TileRows {
    const int8_t *q, *fine;
    const RowBlock* blocks;
};

PRONK_INLINE TileRows rows_at(const QuantizedRows& a, int64_t t, int64_t span) {
    const int64_t at = (span * a.rows + t) * kSpan;
    return {a.q + at * kBlock, a.fine + at * kBlock, a.blocks + at};
}

// Blocks of a span.
PRONK_INLINE int span_blocks(int64_t blocks, int64_t span) {
    return int(blocks - span * kSpan < kSpan ? blocks - span * kSpan : kSpan);
}

// Minus the zero point times the sums of a row's integers: where a row's sums begin.
template <Pack P>
PRONK_INLINE int32_t start_of(int32_t whole, int32_t first, int sub) {
    constexpr PackInfo info = pack_info(P);
    return -info.zero * (info.scales == 1 ? whole : sub == 0 ? first : whole - first);
}

// A tile of MR rows by NV vectors over block i of a span: `code(v, g)` yields codes, `scales(v)` scales.
template <Pack P, int MR, int NV, class Code, class Scale>
PRONK_INLINE void tile_block(const TileRows& rows, int i, Code&& code, Scale&& scales, vf (&total)[MR][NV]) {
    const RowBlock* row = rows.blocks + i;
    vi isum[MR][NV][pack_info(P).scales];
    const auto start = [&](int m, int sub) {
        return splat(start_of<P>(row[m * kSpan].q_sum, row[m * kSpan].q_first, sub));
    };
    dot_block<P, MR, NV>([&](int m) { return rows.q + m * kSpanInputs + i * kBlock; }, code, start, isum);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
        const BlockScales<P>& s = scales(v);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) total[m][v] = add_block<P>(total[m][v], isum[m][v], s, row[m * kSpan]);
    }
}

// The fine parts of block i of MR rows, any ones of a span: `at[m]` is the number of row m, totals
// are in out [rows][kGroupRows].
template <Pack P, int MR, int NV, class Code, class Scale>
PRONK_INLINE void fine_block(const TileRows& rows, int i, const uint16_t* at, Code&& code, Scale&& scales, float* out) {
    vi isum[MR][NV][pack_info(P).scales];
    const auto row = [&](int m) -> const RowBlock& { return rows.blocks[at[m] * kSpan + i]; };
    const auto start = [&](int m, int sub) { return splat(start_of<P>(row(m).fine_sum, row(m).fine_first, sub)); };
    dot_block<P, MR, NV>([&](int m) { return rows.fine + at[m] * kSpanInputs + i * kBlock; }, code, start, isum);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
        const BlockScales<P>& s = scales(v);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
            float* total = out + at[m] * kGroupRows + v * W;
            store(total, add_fine<P>(load_f32(total), isum[m][v], s, row(m)));
        }
    }
}

// ---- a few rows: panels streamed from memory -----------------------------------------------------

PRONK_INLINE bool any_fine(const TileRows& rows, int count, int n) {
    int largest = kNoFine;
    for (int m = 0; m < count; ++m)
        for (int i = 0; i < n; ++i) {
            const int sum = rows.blocks[m * kSpan + i].fine_sum;
            largest = sum > largest ? sum : largest;
        }
    return largest != kNoFine;
}

// Adds the fine parts of a span, which begins at `head` in the first panel, to the totals.
template <Pack P, int MR, int NV>
__attribute__((noinline)) void stream_fine(const TileRows& rows, int n, const uint8_t* head, size_t stride,
                                           vf (&total)[MR][NV]) {
    constexpr PackInfo info = pack_info(P);
    float out[MR * kGroupRows];
    for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v) store(out + m * kGroupRows + v * W, total[m][v]);
    const uint8_t* const super = head;
    head += info.super_bytes;
    for (int i = 0; i < n; ++i, head += info.head_bytes + info.code_bytes)
        for (uint16_t m = 0; m < MR; ++m) {
            if (rows.blocks[m * kSpan + i].fine_sum == kNoFine) continue;
            const uint8_t* body = head + info.head_bytes;
            fine_block<P, 1, NV>(
                rows, i, &m, [&](int v, int g) { return codes<P>(body + v / kPerPanel * stride, v % kPerPanel, g); },
                [&](int v) {
                    const size_t offset = v / kPerPanel * stride;
                    return block_scales<P>(super + offset, head + offset, v % kPerPanel);
                },
                out);
        }
    for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v) total[m][v] = load_f32(out + m * kGroupRows + v * W);
}

// All rows (MR of them) of NV vectors. out [MR][kGroupRows].
template <Pack P, int MR, int NV>
void stream_rows(const QuantizedRows& a, const uint8_t* panel, size_t stride, float* out) {
    constexpr PackInfo info = pack_info(P);
    constexpr int kAhead = 1024, kPanels = NV / kPerPanel;
    vf total[MR][NV] = {};
    const int64_t blocks = a.k / kBlock;
    const uint8_t* super = panel;
    const uint8_t* head = panel;
    for (int64_t span = 0; span < spans_of(a.k); ++span) {
        const TileRows rows = rows_at(a, 0, span);
        const int n = span_blocks(blocks, span);
        const uint8_t* const first = head;
        for (int i = 0; i < n; ++i) {
            if constexpr (info.super_bytes > 0) {
                if (i % 8 == 0) super = head, head += info.super_bytes;
            }
            const uint8_t* body = head + info.head_bytes;
            // The hardware prefetcher stops at each page; past these panels the next ones follow. Into
            // the L2 cache: the L1 has too few buffers for as many lines as memory wants in flight.
            const uint8_t* ahead = head + kAhead;
            if (ahead >= panel + stride) ahead += (kPanels - 1) * stride;
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 10
                for (int line = 0; line < info.head_bytes + info.code_bytes; line += 64)
                    __builtin_prefetch(ahead + p * stride + line, 0, 2);
            tile_block<P, MR, NV>(
                rows, i, [&](int v, int g) { return codes<P>(body + v / kPerPanel * stride, v % kPerPanel, g); },
                [&](int v) {
                    const size_t offset = v / kPerPanel * stride;
                    return block_scales<P>(super + offset, head + offset, v % kPerPanel);
                },
                total);
            head = body + info.code_bytes;
        }
        if (any_fine(rows, MR, n)) stream_fine<P, MR, NV>(rows, n, first, stride, total);
    }
    for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v) store(out + m * kGroupRows + v * W, total[m][v]);
}

template <Pack P, int MR = kFewRows>
void few_rows(const QuantizedRows& a, const uint8_t* panel, size_t stride, float* out) {
    if (a.rows == MR) return stream_rows<P, MR, kFewVectors>(a, panel, stride, out);
    if constexpr (MR > 1) few_rows<P, MR - 1>(a, panel, stride, out);
}

// ---- many rows: a span of panels at a time --------------------------------------------------------

// What all rows share of a span of up to kGroupPanels panels: scales as floats and, where they take
// more than a mask and a shift, codes as bytes.
template <Pack P>
constexpr bool kUnpack = P == Pack::Q5K || P == Pack::Q6K;

template <Pack P>
struct Span {
    const uint8_t* body[kGroupPanels][kSpan];  // codes of each block
    BlockScales<P> scales[kGroupPanels * kPerPanel][kSpan];
    alignas(64) uint8_t bytes[kUnpack<P> ? kGroupPanels : 0][kSpan][kGroups * 64];

    PRONK_INLINE vb code(int v, int i, int g) const {
        if constexpr (kUnpack<P>)
            return load<vb>(bytes[v / kPerPanel][i] + g * 64 + v % kPerPanel * W * 4);
        else
            return codes<P>(body[v / kPerPanel][i], v % kPerPanel, g);
    }
};

// Tiles are kVectors wide: where the panels run out, the last one is computed again, and the results
// past `panels` are nobody's.
PRONK_INLINE int padded_panels(int panels) {
    static_assert(kGroupRows % (kVectors * W) == 0);
    return kPerPanel >= kVectors ? panels : (panels * kPerPanel + kVectors - 1) / kVectors * kVectors / kPerPanel;
}

template <Pack P>
void open_span(const uint8_t* panel, size_t stride, int panels, int64_t b0, int n, Span<P>& span) {
    constexpr PackInfo info = pack_info(P);
    const int whole = padded_panels(panels);
    for (int p = 0; p < whole; ++p)
        for (int i = 0; i < n; ++i) {
            const uint8_t* from = panel + (p < panels ? p : panels - 1) * stride;
            const uint8_t* head = from + block_offset(P, b0 + i);
            const uint8_t* super = from + block_offset(P, (b0 + i) / 8 * 8) - info.super_bytes;
            const uint8_t* body = head + info.head_bytes;
            span.body[p][i] = body;
#pragma GCC unroll 4
            for (int h = 0; h < kPerPanel; ++h) {
                span.scales[p * kPerPanel + h][i] = block_scales<P>(super, head, h);
                if constexpr (kUnpack<P>) {
#pragma GCC unroll 8
                    for (int g = 0; g < kGroups; ++g)
                        store(span.bytes[p][i] + g * 64 + h * W * 4, codes<P>(body, h, g));
                }
            }
        }
}

// Memory that a tile asks for while it computes, so that the next span is at hand when it is due:
// `lines` cache lines of each of `panels` panels.
struct Ahead {
    const uint8_t* from;
    size_t stride;
    int lines, panels;
};

// Adds n blocks of a span to MR rows of the totals [MR][kGroupRows].
template <Pack P, int MR, int NV>
void tile(const TileRows& rows, const Span<P>& span, int v0, int n, bool first, const Ahead& ahead, float* out) {
    vf total[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) total[m][v] = first ? vf{} : load_f32(out + m * kGroupRows + v * W);
    int line = 0;
    for (int i = 0; i < n; ++i) {
        for (; line < ahead.lines * (i + 1) / n; ++line)
            for (int p = 0; p < ahead.panels; ++p) __builtin_prefetch(ahead.from + p * ahead.stride + line * 64, 0, 2);
        tile_block<P, MR, NV>(
            rows, i, [&](int v, int g) { return span.code(v0 + v, i, g); },
            [&](int v) -> const BlockScales<P>& { return span.scales[v0 + v][i]; }, total);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(out + m * kGroupRows + v * W, total[m][v]);
}

template <Pack P, int NV, int MR = kTileRows - 1>
void last_rows(int64_t left, const TileRows& rows, const Span<P>& span, int v0, int n, bool first, const Ahead& ahead,
               float* out) {
    if (left == MR) return tile<P, MR, NV>(rows, span, v0, n, first, ahead, out);
    if constexpr (MR > 1) last_rows<P, NV, MR - 1>(left, rows, span, v0, n, first, ahead, out);
}

// Rows t.. of the tile rows, over one span of `vectors` vectors.
template <Pack P>
void tile_rows(const QuantizedRows& a, int64_t t, const Span<P>& span, int vectors, int64_t b0, int n, const Ahead& ahead,
               float* out) {
    const TileRows rows = rows_at(a, t, b0 / kSpan);
    const bool first = b0 == 0;
    constexpr Ahead kNothing{};
    for (int v = 0; v < vectors; v += kVectors) {
        const Ahead& now = v ? kNothing : ahead;
        if (a.rows - t >= kTileRows)
            tile<P, kTileRows, kVectors>(rows, span, v, n, first, now, out + v * W);
        else
            last_rows<P, kVectors>(a.rows - t, rows, span, v, n, first, now, out + v * W);
    }
}

template <Pack P, int NV, int MR>
PRONK_INLINE void fine_tile(const TileRows& rows, int i, const uint16_t* at, const Span<P>& span, int v0, float* out) {
    fine_block<P, MR, NV>(
        rows, i, at, [&](int v, int g) { return span.code(v0 + v, i, g); },
        [&](int v) -> const BlockScales<P>& { return span.scales[v0 + v][i]; }, out + v0 * W);
}

template <Pack P, int NV, int MR = kFineRows - 1>
PRONK_INLINE void last_fine_rows(int left, const TileRows& rows, int i, const uint16_t* at, const Span<P>& span, int v0,
                                 float* out) {
    if (left == MR) return fine_tile<P, NV, MR>(rows, i, at, span, v0, out);
    if constexpr (MR > 1) last_fine_rows<P, NV, MR - 1>(left, rows, i, at, span, v0, out);
}

// Adds the fine parts of a span to the totals of all rows.
template <Pack P, int NV>
void fine_rows(const TileRows& rows, int i, const uint16_t* at, int count, const Span<P>& span, int v0, float* out) {
    int done = 0;
    for (; done + kFineRows <= count; done += kFineRows) fine_tile<P, NV, kFineRows>(rows, i, at + done, span, v0, out);
    if (done < count) last_fine_rows<P, NV>(count - done, rows, i, at + done, span, v0, out);
}

template <Pack P>
void add_fine_parts(const QuantizedRows& a, const Span<P>& span, int vectors, int64_t b0, int n, float* out) {
    const TileRows rows = rows_at(a, 0, b0 / kSpan);
    for (int64_t i = 0; i < n; ++i)
        for (int v = 0; v < vectors; v += kVectors)
            fine_rows<P, kVectors>(rows, int(i), a.fine_rows + (b0 + i) * a.rows, a.fine_count[b0 + i], span, v, out);
}

// The span after this one: of these panels or, past their end, of the ones behind them.
template <Pack P>
Ahead next_span(const uint8_t* panel, size_t stride, int panels, int64_t b0, int64_t blocks) {
    if (b0 >= blocks) panel += panels * stride, b0 = 0;
    const int64_t n = blocks - b0 < kSpan ? blocks - b0 : kSpan;
    const size_t from = b0 ? block_offset(P, b0) - pack_info(P).super_bytes : 0;
    const size_t to = b0 + n < blocks ? block_offset(P, b0 + n) - pack_info(P).super_bytes : stride;
    return {panel + from, stride, int((to - from + 63) / 64), panels};
}

// kGroupRows outputs (`panels` panels of them are there) of all rows. out [rows][kGroupRows].
template <Pack P>
void group_outputs(const QuantizedRows& a, const uint8_t* panel, int panels, float* out) {
    const size_t stride = panel_bytes(P, a.k);
    if (a.rows <= kFewRows && panels == kGroupPanels) {
        for (int v = 0; v < kGroupPanels * kPerPanel; v += kFewVectors)
            few_rows<P>(a, panel + v / kPerPanel * stride, stride, out + v * W);
        return;
    }
    Span<P> span;
    const int64_t blocks = a.k / kBlock;
    const int tiles = int((a.rows + kTileRows - 1) / kTileRows), vectors = padded_panels(panels) * kPerPanel;
    for (int64_t b0 = 0; b0 < blocks; b0 += kSpan) {
        const int n = span_blocks(blocks, b0 / kSpan);
        open_span<P>(panel, stride, panels, b0, n, span);
        const Ahead next = next_span<P>(panel, stride, panels, b0 + n, blocks);
        int line = 0;  // each tile asks for its share of the next span
        for (int i = 0; i < tiles; ++i) {
            const int to = next.lines * (i + 1) / tiles;
            const Ahead share{next.from + line * 64, stride, to - line, panels};
            const int64_t t = int64_t(i) * kTileRows;
            tile_rows<P>(a, t, span, vectors, b0, n, share, out + t * kGroupRows);
            line = to;
        }
        add_fine_parts<P>(a, span, vectors, b0, n, out);
    }
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
        if (panels == kGroupPanels && kDenseVectors == kGroupPanels * kPerPanel) {
            dense_rows<P, kDenseVectors>(x + k0, rows, k, n, panel_of, 0, k0 == 0, out);
        } else {
            for (int p = 0; p < panels; ++p)
                dense_rows<P, kPerPanel>(x + k0, rows, k, n, panel_of, p * kPerPanel, k0 == 0, out);
        }
    }
}

}  // namespace

void linear_group(Pack pack, const LinearInputs& in, const uint8_t* panel, int panels, float* out) {
    switch (pack) {
        case Pack::F32: return group_dense<Pack::F32>(in.x, in.rows, in.k, panel, panels, out);
        case Pack::F16: return group_dense<Pack::F16>(in.x, in.rows, in.k, panel, panels, out);
        case Pack::BF16: return group_dense<Pack::BF16>(in.x, in.rows, in.k, panel, panels, out);
        case Pack::Q4: return group_outputs<Pack::Q4>(in.quantized, panel, panels, out);
        case Pack::Q4M: return group_outputs<Pack::Q4M>(in.quantized, panel, panels, out);
        case Pack::Q4K: return group_outputs<Pack::Q4K>(in.quantized, panel, panels, out);
        case Pack::Q5K: return group_outputs<Pack::Q5K>(in.quantized, panel, panels, out);
        case Pack::Q6K: return group_outputs<Pack::Q6K>(in.quantized, panel, panels, out);
        case Pack::Q8: return group_outputs<Pack::Q8>(in.quantized, panel, panels, out);
        case Pack::I8: return group_outputs<Pack::I8>(in.quantized, panel, panels, out);
        case Pack::I8M: return group_outputs<Pack::I8M>(in.quantized, panel, panels, out);
        case Pack::I8S: return group_outputs<Pack::I8S>(in.quantized, panel, panels, out);
        case Pack::I8SM: return group_outputs<Pack::I8SM>(in.quantized, panel, panels, out);
    }
}

namespace {

// A block keeps a fine part, 16 bits in all, if its largest magnitude is more than kStandOut times
// the row's root mean square. What 8 bits cost a row in accuracy comes from the few blocks with large
// outliers, and rows of one model have them at the same inputs, so that tiles seldom meet one.
constexpr float kStandOut = 6.0f;

float root_mean_square(const float* x, int64_t k) {
    vf squares{};
    for (int64_t i = 0; i < k; i += W) squares = fma(load_f32(x + i), load_f32(x + i), squares);
    return __builtin_sqrtf(sum_lanes(squares) / float(k));
}

// `fine` is written where there is a fine part; nobody reads it elsewhere.
template <bool kFine>
PRONK_INLINE void quantize_block(const float* x, const Rounding& rounding, int8_t* q, int8_t* fine, RowBlock& block) {
    for (int i = 0; i < kBlock; i += W) {
        const vi code = round_to_int(x + i, rounding);
        const vi top = kFine ? (code + 128) >> 8 : code;
        store(q + i, __builtin_convertvector(top, vc));
        if (kFine) store(fine + i, __builtin_convertvector(code - (top << 8), vc));
    }
    const int32_t first = sum_bytes(q), sum = first + sum_bytes(q + 16);
    const int32_t fine_first = kFine ? sum_bytes(fine) : 0, fine_sum = kFine ? fine_first + sum_bytes(fine + 16) : 0;
    block.q_sum = int16_t(sum), block.q_first = int16_t(first);
    block.fine_sum = kFine ? int16_t(fine_sum) : kNoFine;
    block.fine_first = int16_t(fine_first);
    block.sum = (float(sum) + float(fine_sum) * 0.00390625f) * block.scale;
}

}  // namespace

void quantize_row(const float* x, int64_t k, int64_t rows, int64_t t, int8_t* q, int8_t* fine, RowBlock* blocks) {
    const float limit = kStandOut * root_mean_square(x, k);
    const QuantizedRows a{q, fine, blocks, nullptr, nullptr, rows, k};
    for (int64_t b = 0; b < k / kBlock; ++b, x += kBlock) {
        const int64_t at = rows_at(a, t, b / kSpan).q - q + b % kSpan * kBlock;
        RowBlock& block = blocks[at / kBlock];
        const float peak = peak_of(x, kBlock);
        const Rounding eight = rounding_of(peak, 127.0f);
        block.scale = eight.scale;
        if (peak > limit)
            quantize_block<true>(x, rounding_of(peak, 127.0f * 256.0f), q + at, fine + at, block);
        else
            quantize_block<false>(x, eight, q + at, fine + at, block);
    }
}

}  // namespace pronk::PRONK_ISA
