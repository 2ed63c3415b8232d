// What attention over floats and over integers share: runs of positions whose scores become weights
// together, and tiles of query vectors. For the instruction set this file is compiled for.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace pronk::PRONK_ISA {
namespace {

constexpr int kRun = 4 * kKvBlock;  // positions of a run
constexpr int kRunBlocks = kRun / kKvBlock;
static_assert(kKvPartition % kRunBlocks == 0);
constexpr float kNegInf = -__builtin_inff();

// Calls tile(integral constant of the number of rows, first row) for rows from..n-1, MAX at a time.
template <int N>
struct Count {
    static constexpr int value = N;
};
template <int LEFT, class Tile>
PRONK_INLINE void last_tile(int64_t rows, int64_t at, const Tile& tile) {
    if (rows == LEFT) return tile(Count<LEFT>{}, at);
    if constexpr (LEFT > 1) last_tile<LEFT - 1>(rows, at, tile);
}
template <int MAX, class Tile>
PRONK_INLINE void for_tiles(int64_t from, int64_t n, const Tile& tile) {
    for (; from + MAX <= n; from += MAX) tile(Count<MAX>{}, from);
    if constexpr (MAX > 1) {
        if (from < n) last_tile<MAX - 1>(n - from, from, tile);
    }
}

PRONK_INLINE vi lanes_from(int64_t first) {
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane + int32_t(first);
}

// The largest of `width` scores of one vector; those past `visible` positions become minus infinity.
PRONK_INLINE float mask_and_peak(float* scores, int64_t width, int64_t visible) {
    vf top = splat(kNegInf);
    for (int64_t i = 0; i < width; i += W) {
        vf s = load_f32(scores + i);
        if (visible < i + W) {
            s = lanes_from(i) < int32_t(visible) ? s : splat(kNegInf);
            store(scores + i, s);
        }
        top = max(top, s);
    }
    return max_lanes(top);
}

// Adds the sum of a run's weights, taken relative to its largest score `next`, to a vector's softmax
// sums. Returns the factor by which what was summed before shrinks.
PRONK_INLINE float add_weights(float total, float next, float& largest, float& sum) {
    const float shrink = exp(splat(largest - next))[0];
    sum = sum * shrink + total;
    largest = next;
    return shrink;
}

// One head's keys or values of a block, and those to ask memory for meanwhile: what is read next, or
// the same again where nothing is known of that. Each line that is read asks for its twin: the
// hardware does not follow from block to block, and all of a head's blocks are apart.
template <class T>
struct Stretch {
    const T *data, *ahead;
    PRONK_INLINE const T* at(int64_t i) const {
        __builtin_prefetch(ahead + i, 0, 2);
        return data + i;
    }
};

// A tile that meets key/value blocks first..last-1 of its table run by run: calls run(first block,
// last block, first vector that sees anything of it).
template <class Run>
PRONK_INLINE void for_runs(const QueryTile& tile, int64_t first, int64_t last, const Run& run) {
    for (int64_t b = first; b < last; b += kRunBlocks) {
        const int64_t hidden = b * kKvBlock - tile.first_position;  // rows before the run's first position
        const int64_t from = hidden > 0 ? hidden * tile.group : 0;
        if (from < tile.rows * tile.group) run(b, b + kRunBlocks < last ? b + kRunBlocks : last, from);
    }
}

PRONK_INLINE void clear(const Partial& out, int64_t vectors, int64_t padded_dim) {
    for (int64_t i = 0; i < vectors; ++i) {
        out.largest[i] = kNegInf;
        out.sum[i] = 0;
    }
    std::memset(out.values, 0, vectors * padded_dim * sizeof(float));
}

}  // namespace
}  // namespace pronk::PRONK_ISA
