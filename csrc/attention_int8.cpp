// Attention over keys and values stored as 8-bit integers, in integers. Compiled once for each ISA.
//
// Queries are rounded to 8 bits by the vector, softmax weights (times the scales of the values) by the
// run, so that both products are sums of bytes times bytes. Queries and keys are rotated first: their
// products stay, but the few dims that stand out in every key are spread over all, and rounding costs
// half as much. As in attention_kernels.cpp, every number of a query vector is computed by itself.
#include "softmax.h"

namespace pronk::PRONK_ISA {
namespace {

// Register tiles: query vectors by vectors of positions, query vectors by vectors of a head.
#if defined(PRONK_VNNI_512)
constexpr int kScoreRows = 12, kScoreVectors = 2, kValueRows = 6, kValueVectors = 4;
#elif defined(PRONK_X86)
constexpr int kScoreRows = 4, kScoreVectors = 2, kValueRows = 4, kValueVectors = 2;
#else
constexpr int kScoreRows = 2, kScoreVectors = 4, kValueRows = 2, kValueVectors = 4;
#endif

constexpr int kZero = 128;  // the byte of a key that stands for 0

// Four dims of a key or four positions of a value side by side: the codes that a product sums.
PRONK_INLINE int64_t key_place(int64_t d, int64_t at) { return (d / 4 * kKvBlock + at) * 4 + d % 4; }
PRONK_INLINE int64_t value_place(int64_t d, int64_t at, int64_t padded_dim) { return (at / 4 * padded_dim + d) * 4 + at % 4; }

PRONK_INLINE uint8_t* keys_of(const KvLayer& kv, int64_t block, int64_t g) {
    return kv.k + (block * kv.heads + g) * kv.padded_dim * kKvBlock;
}
PRONK_INLINE uint8_t* values_of(const KvLayer& kv, int64_t block, int64_t g) {
    return kv.v + (block * kv.heads + g) * kv.padded_dim * kKvBlock;
}
PRONK_INLINE int64_t scales_of(const KvLayer& kv, int64_t block, int64_t g) { return (block * kv.heads + g) * kKvBlock; }

// Lane i becomes the sum of lanes i and i + LEN, lane i + LEN their difference.
template <int LEN>
PRONK_INLINE vf add_lanes(vf x) {
    vf other, sign;
    for (int lane = 0; lane < W; ++lane) {
        other[lane] = x[lane ^ LEN];
        sign[lane] = lane & LEN ? -1.0f : 1.0f;
    }
    return x * sign + other;
}
template <int LEN>
PRONK_INLINE void add_within(float* x, int64_t padded_dim) {
    for (int64_t d = 0; d < padded_dim; d += W) store(x + d, add_lanes<LEN>(load_f32(x + d)));
}
PRONK_INLINE void add_across(float* x, int64_t dim, int64_t len) {
    for (int64_t start = 0; start < dim; start += 2 * len)
        for (int64_t d = start; d < start + len; d += W) {
            const vf a = load_f32(x + d), b = load_f32(x + d + len);
            store(x + d, a + b);
            store(x + d + len, a - b);
        }
}

// x [padded_dim], zero from dim on, times an orthogonal matrix that is its own inverse: the Hadamard
// matrix of the largest power of two that divides dim, along the diagonal. As QuaRot does it (Ashkboos
// et al. 2024, section 4, "Cache quantization").
void rotate(float* x, int64_t dim, int64_t padded_dim) {
    const int64_t size = dim & -dim;
    if (size > 1) add_within<1>(x, padded_dim);
    if (size > 2) add_within<2>(x, padded_dim);
    if (W > 4 && size > 4) add_within<W / 2 < 4 ? 1 : 4>(x, padded_dim);
    if (W > 8 && size > 8) add_within<W / 2 < 8 ? 1 : 8>(x, padded_dim);
    for (int64_t len = W; len < size; len *= 2) add_across(x, dim, len);
    const float unit = 1.0f / __builtin_sqrtf(float(size));
    for (int64_t d = 0; d < padded_dim; d += W) store(x + d, load_f32(x + d) * unit);
}

// The query vectors of a tile as integers.
struct Queries {
    alignas(64) int8_t codes[kTileVectors * kMaxHeadDim];  // [vector][padded_dim]
    float scale[kTileVectors];
    int32_t offset[kTileVectors];  // what kZero in every key adds to the products
};

// q [padded_dim] as vector i of `to`.
void round_query(const float* q, int64_t padded_dim, int64_t i, Queries& to) {
    const Rounding rounding = rounding_of(peak_of(q, padded_dim), 127.0f);
    vi sum{};
    for (int64_t d = 0; d < padded_dim; d += W) {
        const vi code = round_to_int(q + d, rounding);
        store(to.codes + i * padded_dim + d, __builtin_convertvector(code, vc));
        sum += code;
    }
    // all products with a query of nothing but zeros are 0, whatever its scale
    to.scale[i] = rounding.scale == 0.0f ? 1.0f : rounding.scale;
    to.offset[i] = 0;
    for (int lane = 0; lane < W; ++lane) to.offset[i] += kZero * sum[lane];
}

PRONK_INLINE int32_t four(const void* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return bytes;
}

// scores [MQ][kRun] of vectors i.. with NV vectors of keys, without the scales of the queries
template <int MQ, int NV>
PRONK_INLINE void score_tile(const Queries& queries, int64_t i, const Stretch<uint8_t>& keys, int first, const float* scale,
                             int64_t padded_dim, float* scores) {
    const int8_t* q = queries.codes + i * padded_dim;
    vi sum[MQ][NV];
#pragma GCC unroll 16
    for (int m = 0; m < MQ; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[m][v] = splat(-queries.offset[i + m]);
    for (int64_t d = 0; d < padded_dim; d += 4) {
        vb key[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) key[v] = load<vb>(keys.at(d * kKvBlock + (first + v * W) * 4));
#pragma GCC unroll 16
        for (int m = 0; m < MQ; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[m][v] = dot4(sum[m][v], key[v], four(q + m * padded_dim + d));
    }
#pragma GCC unroll 16
    for (int m = 0; m < MQ; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(scores + m * kRun + v * W, to_float(sum[m][v]) * load_f32(scale + first + v * W));
}

// The weights of a run as integers.
struct Weights {
    alignas(64) uint8_t codes[kTileVectors * kRun];  // [vector][kRun]
    float scale[kTileVectors];
};

// exp(x) for x <= 0, and about 1e-38 below -87; 3e-6 of itself wrong at most (a minimax polynomial), which rounding to a byte
// covers. NaN stays NaN.
PRONK_INLINE vf exp_coarse(vf x) {
    x = max(splat(-87.0f), x);
    const vf magic = splat(12582912.0f);  // see exp
    const vf shifted = fma(x, splat(1.44269504f), magic);
    const vf r = fma(shifted - magic, splat(-0.69314718f), x);
    vf p = splat(4.145855e-2f);
    p = fma(p, r, splat(1.6790941e-1f));
    p = fma(p, r, splat(5.0004361e-1f));
    p = fma(p, r, splat(9.9996339e-1f));
    p = fma(p, r, splat(9.9999926e-1f));
    return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(shifted) << 23));
}

// Scores of one vector over a run, in units of `unit`, to weights, and these times the scales of the
// values to integers. The scale of a position that is not visible may be anything. Returns the factor
// by which sums so far shrink, and updates largest and sum.
PRONK_INLINE float soften(float* scores, int64_t width, int64_t visible, float unit, const float* const* scales, int64_t i,
                          Weights& to, float& largest, float& sum) {
    const float peak = mask_and_peak(scores, width, visible) * unit;
    const float next = peak > largest ? peak : largest;
    vf total{};
    for (int64_t at = 0; at < width; at += W) {
        const vf weight = exp_coarse(fma(load_f32(scores + at), splat(unit), splat(-next)));
        total += weight;
        vf scaled = weight * load_f32(scales[at / kKvBlock] + at % kKvBlock);
        if (visible < at + W) scaled = lanes_from(at) < int32_t(visible) ? scaled : vf{};
        store(scores + at, scaled);
    }
    const Rounding rounding = rounding_of(peak_of(scores, width), 255.0f);
    for (int64_t at = 0; at < width; at += W)
        store(to.codes + i * kRun + at, __builtin_convertvector(round_to_int(scores + at, rounding), vu));
    to.scale[i] = rounding.scale;
    return add_weights(sum_lanes(total), next, largest, sum);
}

// out [MQ][padded_dim] = out * shrink + weights times the values of n blocks, NV vectors wide
template <int MQ, int NV>
PRONK_INLINE void weigh_tile(const Weights& w, int64_t i, const float* shrink, const Stretch<uint8_t>* blocks, int64_t n,
                             int64_t padded_dim, int64_t d, float* out) {
    vi sum[MQ][NV] = {};
    for (int64_t b = 0; b < n; ++b)
        for (int64_t at = 0; at < kKvBlock; at += 4) {
            vb value[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) value[v] = load<vb>(blocks[b].at(at * padded_dim + (d + v * W) * 4));
#pragma GCC unroll 8
            for (int m = 0; m < MQ; ++m) {
                const vb weight = reinterpret_cast<vb>(splat(four(w.codes + (i + m) * kRun + b * kKvBlock + at)));
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) sum[m][v] = dot4(sum[m][v], weight, value[v]);
            }
        }
#pragma GCC unroll 8
    for (int m = 0; m < MQ; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            float* p = out + m * padded_dim + d + v * W;
            store(p, fma(to_float(sum[m][v]), splat(w.scale[i + m]), load_f32(p) * shrink[i + m]));
        }
}

template <int MQ>
PRONK_INLINE void weigh_rows(const Weights& w, int64_t i, const float* shrink, const Stretch<uint8_t>* blocks, int64_t n,
                             int64_t padded_dim, float* out) {
    int64_t d = 0;
    for (; d + kValueVectors * W <= padded_dim; d += kValueVectors * W)
        weigh_tile<MQ, kValueVectors>(w, i, shrink, blocks, n, padded_dim, d, out);
    for (; d < padded_dim; d += W) weigh_tile<MQ, 1>(w, i, shrink, blocks, n, padded_dim, d, out);
}

// Adds a run of key/value blocks first..last-1 (four at most) to the sums of vectors from..n-1.
// The next run begins at block last, if that is before `end`.
void attend_run(const KvLayer& kv, const QueryTile& tile, const Queries& q, int64_t first, int64_t last, int64_t end,
                int64_t from, const Partial& out) {
    const int64_t n = tile.rows * tile.group, padded = kv.padded_dim, blocks = last - first;
    alignas(64) float scores[kTileVectors * kRun];
    Weights weights;
    float shrink[kTileVectors];
    Stretch<uint8_t> values[kRunBlocks] = {};
    const float* value_scales[kRunBlocks];
    const auto keys_at = [&](int64_t b) { return keys_of(kv, tile.blocks[b], tile.head); };
    for (int64_t b = 0; b < blocks; ++b) values[b].data = values_of(kv, tile.blocks[first + b], tile.head);
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t scales = scales_of(kv, tile.blocks[first + b], tile.head);
        Stretch<uint8_t> keys{keys_at(first + b), b + 1 < blocks ? keys_at(first + b + 1) : values[0].data};
        value_scales[b] = kv.v_scale + scales;
        values[b].ahead = b + 1 < blocks ? values[b + 1].data : last < end ? keys_at(last) : values[b].data;
        for_tiles<kScoreRows>(from, n, [&](auto rows, int64_t i) {
            for (int at = 0; at < kKvBlock; at += kScoreVectors * W)
                score_tile<decltype(rows)::value, kScoreVectors>(q, i, keys, at, kv.k_scale + scales, padded,
                                                                 scores + i * kRun + b * kKvBlock + at);
            keys.ahead = keys.data;
        });
    }
    for (int64_t i = from; i < n; ++i) {
        const int64_t visible = tile.first_position + i / tile.group + 1 - first * kKvBlock;
        float* own = scores + i * kRun;
        shrink[i] = soften(own, blocks * kKvBlock, visible, q.scale[i], value_scales, i, weights, out.largest[i], out.sum[i]);
    }
    for_tiles<kValueRows>(from, n, [&](auto rows, int64_t i) {
        weigh_rows<decltype(rows)::value>(weights, i, shrink, values, blocks, padded, out.values + i * padded);
        for (auto& v : values) v.ahead = v.data;
    });
}

// Codes of row [dim], handed to place(d, code); returns the scale (largest magnitude / 127).
template <class Place>
PRONK_INLINE float round_row(const float* row, int64_t dim, int64_t padded_dim, const Place& place) {
    const Rounding rounding = rounding_of(peak_of(row, padded_dim), 127.0f);
    for (int64_t d = 0; d < padded_dim; d += W) {
        const vi code = round_to_int(row + d, rounding);
        for (int lane = 0; lane < W && d + lane < dim; ++lane) place(d + lane, code[lane]);
    }
    return rounding.scale;
}

// A row of one head with zeros behind it.
struct Row {
    alignas(64) float x[kMaxHeadDim] = {};
    Row(const float* from, int64_t dim) { std::memcpy(x, from, dim * sizeof(float)); }
};

}  // namespace

void load_query_int8(const KvLayer& kv, const float* x, float scale, float* q) {
    for (int64_t d = 0; d < kv.padded_dim; ++d) q[d] = d < kv.head_dim ? x[d] * scale : 0.0f;
    rotate(q, kv.head_dim, kv.padded_dim);
}

void attend_int8(const KvLayer& kv, const QueryTile& tile, int64_t first, int64_t last, const Partial& out) {
    const int64_t n = tile.rows * tile.group;
    Queries q;
    for (int64_t i = 0; i < n; ++i) round_query(tile.q + i * kv.padded_dim, kv.padded_dim, i, q);
    clear(out, n, kv.padded_dim);
    for_runs(tile, first, last,
             [&](int64_t b, int64_t to, int64_t from) { attend_run(kv, tile, q, b, to, last, from, out); });
}

void store_key_int8(const KvLayer& kv, int64_t block, int64_t g, int64_t at, const float* x) {
    uint8_t* to = keys_of(kv, block, g);
    Row row(x, kv.head_dim);
    rotate(row.x, kv.head_dim, kv.padded_dim);
    kv.k_scale[scales_of(kv, block, g) + at] = round_row(
        row.x, kv.head_dim, kv.padded_dim, [&](int64_t d, int32_t code) { to[key_place(d, at)] = uint8_t(code + kZero); });
}

void store_value_int8(const KvLayer& kv, int64_t block, int64_t g, int64_t at, const float* x) {
    uint8_t* to = values_of(kv, block, g);
    const Row row(x, kv.head_dim);
    kv.v_scale[scales_of(kv, block, g) + at] =
        round_row(row.x, kv.head_dim, kv.padded_dim,
                  [&](int64_t d, int32_t code) { to[value_place(d, at, kv.padded_dim)] = uint8_t(int8_t(code)); });
}

}  // namespace pronk::PRONK_ISA
