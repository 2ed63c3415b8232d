// Attention of one key/value head over one partition of the context. Compiled once for each ISA.
//
// A tile holds the query vectors of a few rows and of all query heads that share the head, so each
// key and value is read and converted once for all of them. Every number of a query vector is
// computed by itself, block after block: it does not depend on its companions in the tile.
#include "softmax.h"

namespace pronk::PRONK_ISA {

// attention_int8.cpp
void load_query_int8(const KvLayer&, const float*, float, float*);
void attend_int8(const KvLayer&, const QueryTile&, int64_t, int64_t, const Partial&);
void store_key_int8(const KvLayer&, int64_t, int64_t, int64_t, const float*);
void store_value_int8(const KvLayer&, int64_t, int64_t, int64_t, const float*);

namespace {

// Register tiles: query vectors by vectors of positions, query vectors by vectors of a head.
#if defined(PRONK_VNNI_512)
constexpr int kScoreRows = 12, kScoreVectors = 2, kValueRows = 6, kValueVectors = 4;
#elif defined(PRONK_X86)
constexpr int kScoreRows = 6, kScoreVectors = 2, kValueRows = 3, kValueVectors = 4;
#else
constexpr int kScoreRows = 2, kScoreVectors = 4, kValueRows = 2, kValueVectors = 4;
#endif

// The largest number instead of infinity: a masked position's weight is 0, and 0 * infinity is not.
PRONK_INLINE vf clamp(vf x, float largest) {
    x = x > largest ? splat(largest) : x;
    return x < -largest ? splat(-largest) : x;
}

template <KvType T>
struct Stored;
template <>
struct Stored<KvType::F32> {
    using type = float;
    static PRONK_INLINE vf read(const float* p) { return load_f32(p); }
    static void write(const float* x, int64_t n, float* to) {
        for (int64_t d = 0; d < n; ++d) to[d] = clamp(splat(x[d]), 3.4028235e38f)[0];
    }
};

template <>
struct Stored<KvType::F16> {
    using type = uint16_t;
    static PRONK_INLINE vf read(const uint16_t* p) { return load_f16(p); }
    static void write(const float* x, int64_t n, uint16_t* to) {
        int64_t d = 0;
        for (; d + W <= n; d += W) store_f16(to + d, clamp(load_f32(x + d), 65504.0f));
        for (; d < n; ++d) to[d] = f32_to_f16(clamp(splat(x[d]), 65504.0f)[0]);
    }
};
template <KvType T>
using stored_t = typename Stored<T>::type;

template <KvType T>
PRONK_INLINE const stored_t<T>* keys_of(const KvLayer& kv, int64_t block, int64_t g) {
    return reinterpret_cast<const stored_t<T>*>(kv.k) + (block * kv.heads + g) * kv.head_dim * kKvBlock;
}
template <KvType T>
PRONK_INLINE const stored_t<T>* values_of(const KvLayer& kv, int64_t block, int64_t g) {
    return reinterpret_cast<const stored_t<T>*>(kv.v) + (block * kv.heads + g) * kv.padded_dim * kKvBlock;
}

// scores [MQ][kRun] = q [MQ][stride] times NV vectors of keys [D][32]
template <KvType T, int MQ, int NV>
PRONK_INLINE void score_tile(const float* q, int64_t stride, const Stretch<stored_t<T>>& keys, int64_t dim, int first,
                             float* scores) {
    vf sum[MQ][NV] = {};
    for (int64_t d = 0; d < dim; ++d) {
        vf key[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) key[v] = Stored<T>::read(keys.at(d * kKvBlock + first + v * W));
#pragma GCC unroll 16
        for (int m = 0; m < MQ; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[m][v] = fma(key[v], splat(q[m * stride + d]), sum[m][v]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MQ; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(scores + m * kRun + v * W, sum[m][v]);
}

// Turns `width` scores of one vector into weights: those past `visible` positions become 0. Returns
// the factor by which sums so far shrink, and updates largest and sum.
PRONK_INLINE float soften(float* scores, int64_t width, int64_t visible, float& largest, float& sum) {
    const float peak = mask_and_peak(scores, width, visible);
    const float next = peak > largest ? peak : largest;
    const vf shift = splat(next);
    vf total{};
    for (int64_t i = 0; i < width; i += W) {
        const vf weight = exp(load_f32(scores + i) - shift);
        total += weight;
        store(scores + i, weight);
    }
    return add_weights(sum_lanes(total), next, largest, sum);
}

// values_sum [MQ][Dp] = values_sum * shrink + weights [MQ][kRun] times the values [n] of up to four
// blocks, NV vectors wide
template <KvType T, int MQ, int NV>
PRONK_INLINE void weigh_tile(const float* weights, const float* shrink, const Stretch<stored_t<T>>* blocks, int64_t n,
                             int64_t padded_dim, int64_t d, float* out) {
    vf sum[MQ][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MQ; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[m][v] = load_f32(out + m * padded_dim + d + v * W) * shrink[m];
    for (int64_t start = 0; start < n; start += kKvBlock) {
        const Stretch<stored_t<T>> values = blocks[start / kKvBlock];
        const int64_t count = n - start < kKvBlock ? n - start : kKvBlock;
        for (int64_t i = 0; i < count; ++i) {
            vf value[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) value[v] = Stored<T>::read(values.at(i * padded_dim + d + v * W));
#pragma GCC unroll 8
            for (int m = 0; m < MQ; ++m)
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v)
                    sum[m][v] = fma(value[v], splat(weights[m * kRun + start + i]), sum[m][v]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MQ; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(out + m * padded_dim + d + v * W, sum[m][v]);
}

template <KvType T, int MQ>
PRONK_INLINE void weigh_rows(const float* weights, const float* shrink, const Stretch<stored_t<T>>* blocks, int64_t n,
                             int64_t padded_dim, float* out) {
    int64_t d = 0;
    for (; d + kValueVectors * W <= padded_dim; d += kValueVectors * W)
        weigh_tile<T, MQ, kValueVectors>(weights, shrink, blocks, n, padded_dim, d, out);
    for (; d < padded_dim; d += W) weigh_tile<T, MQ, 1>(weights, shrink, blocks, n, padded_dim, d, out);
}

// Scores of the vectors from..n-1 with the keys of one block, into column `at` of scores [n][kRun].
template <KvType T>
void score_block(const KvLayer& kv, const QueryTile& tile, Stretch<stored_t<T>> keys, int64_t from, int64_t at,
                 float* scores) {
    for_tiles<kScoreRows>(from, tile.rows * tile.group, [&](auto rows, int64_t i) {
        for (int v = 0; v < kKvBlock; v += kScoreVectors * W)
            score_tile<T, decltype(rows)::value, kScoreVectors>(tile.q + i * kv.padded_dim, kv.padded_dim, keys, kv.head_dim,
                                                               v, scores + i * kRun + at + v);
        keys.ahead = keys.data;
    });
}

// Adds a run of key/value blocks first..last-1 (four at most) to the sums of vectors from..n-1.
// The next run begins at block last, if that is before `end`.
template <KvType T>
void attend_run(const KvLayer& kv, const QueryTile& tile, int64_t first, int64_t last, int64_t end, int64_t from,
                const Partial& out) {
    const int64_t n = tile.rows * tile.group, padded = kv.padded_dim, start = first * kKvBlock;
    alignas(64) float scores[kTileVectors * kRun];
    float shrink[kTileVectors];
    Stretch<stored_t<T>> values[kRunBlocks] = {};
    const auto keys = [&](int64_t b) { return keys_of<T>(kv, tile.blocks[b], tile.head); };
    for (int64_t b = first; b < last; ++b) values[b - first].data = values_of<T>(kv, tile.blocks[b], tile.head);
    for (int64_t b = first; b < last; ++b) {
        score_block<T>(kv, tile, {keys(b), b + 1 < last ? keys(b + 1) : values[0].data}, from, (b - first) * kKvBlock, scores);
        values[b - first].ahead = b + 1 < last ? values[b + 1 - first].data : last < end ? keys(last) : values[b - first].data;
    }
    for (int64_t i = from; i < n; ++i) {
        const int64_t visible = tile.first_position + i / tile.group + 1 - start;
        shrink[i] = soften(scores + i * kRun, (last - first) * kKvBlock, visible, out.largest[i], out.sum[i]);
    }
    // positions past the context hold whatever an earlier owner left; their weight is 0, but
    // 0 * infinity is not, so they are not read
    const int64_t used = tile.length - start < kRun ? tile.length - start : kRun;
    const int64_t count = used < (last - first) * kKvBlock ? used : (last - first) * kKvBlock;
    for_tiles<kValueRows>(from, n, [&](auto rows, int64_t i) {
        weigh_rows<T, decltype(rows)::value>(scores + i * kRun, shrink + i, values, count, padded, out.values + i * padded);
        for (auto& v : values) v.ahead = v.data;
    });
}

template <KvType T>
void attend_partition(const KvLayer& kv, const QueryTile& tile, int64_t first, int64_t last, const Partial& out) {
    clear(out, tile.rows * tile.group, kv.padded_dim);
    for_runs(tile, first, last, [&](int64_t b, int64_t to, int64_t from) { attend_run<T>(kv, tile, b, to, last, from, out); });
}

template <KvType T>
void store_float_key(const KvLayer& kv, int64_t block, int64_t g, int64_t at, const float* x) {
    auto* to = const_cast<stored_t<T>*>(keys_of<T>(kv, block, g)) + at;
    stored_t<T> row[kMaxHeadDim];
    Stored<T>::write(x, kv.head_dim, row);
    for (int64_t d = 0; d < kv.head_dim; ++d) to[d * kKvBlock] = row[d];
}

template <KvType T>
void store_float_value(const KvLayer& kv, int64_t block, int64_t g, int64_t at, const float* x) {
    auto* to = const_cast<stored_t<T>*>(values_of<T>(kv, block, g)) + at * kv.padded_dim;
    Stored<T>::write(x, kv.head_dim, to);
    for (int64_t d = kv.head_dim; d < kv.padded_dim; ++d) to[d] = 0;
}

}  // namespace

void load_query(const KvLayer& kv, const float* x, float scale, float* q) {
    if (kv.type == KvType::I8) return load_query_int8(kv, x, scale, q);
    for (int64_t d = 0; d < kv.padded_dim; ++d) q[d] = d < kv.head_dim ? x[d] * scale : 0.0f;
}

void attend(const KvLayer& kv, const QueryTile& tile, int64_t first, int64_t last, const Partial& out) {
    switch (kv.type) {
        case KvType::F32: return attend_partition<KvType::F32>(kv, tile, first, last, out);
        case KvType::F16: return attend_partition<KvType::F16>(kv, tile, first, last, out);
        case KvType::I8: return attend_int8(kv, tile, first, last, out);
    }
}

void merge(int64_t n, int64_t padded_dim, const Partial& into, const Partial& other) {
    for (int64_t i = 0; i < n; ++i) {
        if (other.largest[i] == kNegInf) continue;  // the partition lies behind this row
        const float largest = into.largest[i] > other.largest[i] ? into.largest[i] : other.largest[i];
        const float a = exp(splat(into.largest[i] - largest))[0], b = exp(splat(other.largest[i] - largest))[0];
        into.largest[i] = largest;
        into.sum[i] = fma(splat(into.sum[i]), splat(a), splat(other.sum[i] * b))[0];
        for (int64_t d = 0; d < padded_dim; d += W) {
            float* to = into.values + i * padded_dim + d;
            store(to, fma(load_f32(to), splat(a), load_f32(other.values + i * padded_dim + d) * b));
        }
    }
}

void store_key(const KvLayer& kv, int64_t block, int64_t g, int64_t at, const float* x) {
    switch (kv.type) {
        case KvType::F32: return store_float_key<KvType::F32>(kv, block, g, at, x);
        case KvType::F16: return store_float_key<KvType::F16>(kv, block, g, at, x);
        case KvType::I8: return store_key_int8(kv, block, g, at, x);
    }
}

void store_value(const KvLayer& kv, int64_t block, int64_t g, int64_t at, const float* x) {
    switch (kv.type) {
        case KvType::F32: return store_float_value<KvType::F32>(kv, block, g, at, x);
        case KvType::F16: return store_float_value<KvType::F16>(kv, block, g, at, x);
        case KvType::I8: return store_value_int8(kv, block, g, at, x);
    }
}

}  // namespace pronk::PRONK_ISA
