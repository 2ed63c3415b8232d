// Splits attention into tasks; the arithmetic is in attention_kernels.cpp.
//
// The context is cut into partitions of fixed length. Each is summed by itself and the sums are
// merged in order, whether one thread does all partitions of a tile or many threads do one each:
// so the split never changes a result.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops.h"
#include "threads.h"

namespace pronk {
namespace {

struct Tile {
    int64_t seq, row, rows;    // rows of the packed step
    int64_t kv_head, head, group;  // query heads head..head+group-1 share kv_head
    int64_t partitions;
};

constexpr int64_t kPartition = kKvPartition * kKvBlock;

std::vector<Tile> list_tiles(const KvLayer& kv, const BatchView& batch, int64_t query_heads) {
    std::vector<Tile> tiles;
    const int64_t group = query_heads / kv.heads, step = std::min<int64_t>(group, kTileVectors);
    const int64_t tile_rows = std::max<int64_t>(1, kTileVectors / group);
    for (int64_t s = 0; s < batch.n_seqs; ++s)
        for (int64_t row = batch.starts[s]; row < batch.starts[s + 1]; row += tile_rows) {
            const int64_t rows = std::min<int64_t>(tile_rows, batch.starts[s + 1] - row);
            const int64_t partitions = batch.positions[row + rows - 1] / kPartition + 1;
            for (int64_t g = 0; g < kv.heads; ++g)
                for (int64_t h = 0; h < group; h += step)
                    tiles.push_back({s, row, rows, g, g * group + h, std::min(step, group - h), partitions});
        }
    return tiles;
}

// Floats of the partial sums of n vectors, and the places of them in memory.
int64_t partial_size(const KvLayer& kv, int64_t n) { return n * (2 + kv.padded_dim); }
Partial partial_at(float* memory, int64_t n) { return {memory, memory + n, memory + 2 * n}; }

// Working memory of one thread: queries and two partial sums.
struct Scratch {
    std::vector<float> q, total, part;

    void reserve(const KvLayer& kv) {
        q.resize(kTileVectors * kv.padded_dim);
        total.resize(partial_size(kv, kTileVectors));
        part.resize(partial_size(kv, kTileVectors));
    }
};

Scratch& thread_scratch(const KvLayer& kv) {
    thread_local Scratch scratch;
    scratch.reserve(kv);
    return scratch;
}

QueryTile load_tile(const KvLayer& kv, const BatchView& batch, const Tile& tile, RowsView q, float* loaded) {
    const float scale = 1.0f / std::sqrt(float(kv.head_dim));
    for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t h = 0; h < tile.group; ++h)
            kernels().load_query(kv, q.data + (tile.row + r) * q.stride + (tile.head + h) * kv.head_dim, scale,
                                 loaded + (r * tile.group + h) * kv.padded_dim);
    return {loaded, tile.rows, tile.group, tile.kv_head, batch.positions[tile.row], batch.lengths[tile.seq],
            batch.blocks + tile.seq * batch.table_width};
}

void attend_one(const KvLayer& kv, const QueryTile& query, int64_t partition, const Partial& out) {
    const int64_t last_position = query.first_position + query.rows - 1;
    const int64_t first = partition * kKvPartition;
    const int64_t last = std::min<int64_t>(first + kKvPartition, last_position / kKvBlock + 1);
    kernels().attend(kv, query, first, last, out);
}

void clear(const Tile& tile, const KvLayer& kv, const Partial& total) {
    const int64_t n = tile.rows * tile.group;
    std::fill_n(total.largest, n, -INFINITY);
    std::fill_n(total.sum, n, 0.0f);
    std::fill_n(total.values, n * kv.padded_dim, 0.0f);
}

void write_out(const KvLayer& kv, const Tile& tile, int64_t query_heads, const Partial& total, float* o) {
    for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t h = 0; h < tile.group; ++h) {
            const int64_t i = r * tile.group + h;
            float* to = o + ((tile.row + r) * query_heads + tile.head + h) * kv.head_dim;
            const float inverse = 1.0f / total.sum[i];
            for (int64_t d = 0; d < kv.head_dim; ++d) to[d] = total.values[i * kv.padded_dim + d] * inverse;
        }
}

// Rows of one sequence that fall into one key/value block: two threads never write to one line.
struct Span {
    int64_t seq, row, rows;
};

std::vector<Span> list_spans(const BatchView& batch) {
    std::vector<Span> spans;
    for (int64_t s = 0; s < batch.n_seqs; ++s)
        for (int64_t row = batch.starts[s]; row < batch.starts[s + 1];) {
            const int64_t room = kKvBlock - batch.positions[row] % kKvBlock;
            const int64_t rows = std::min<int64_t>(room, batch.starts[s + 1] - row);
            spans.push_back({s, row, rows});
            row += rows;
        }
    return spans;
}

void store_rows(const KvLayer& kv, const BatchView& batch, RowsView k, RowsView v) {
    const std::vector<Span> spans = list_spans(batch);
    const auto one = [&](int64_t span_head) {
        const Span& span = spans[span_head / kv.heads];
        const int64_t g = span_head % kv.heads, position = batch.positions[span.row];
        const int64_t block = batch.blocks[span.seq * batch.table_width + position / kKvBlock];
        for (int64_t t = span.row; t < span.row + span.rows; ++t) {
            const int64_t at = (position + t - span.row) % kKvBlock;
            kernels().store_key(kv, block, g, at, k.data + t * k.stride + g * kv.head_dim);
            kernels().store_value(kv, block, g, at, v.data + t * v.stride + g * kv.head_dim);
        }
    };
    const int64_t tasks = int64_t(spans.size()) * kv.heads;
    if (batch.starts[batch.n_seqs] < 16) {  // less work than waking a thread
        for (int64_t i = 0; i < tasks; ++i) one(i);
    } else {
        parallel_for(tasks, one);
    }
}

// One task a tile; the thread walks its partitions. The longest go first, so that all threads end together.
void attend_by_tile(const KvLayer& kv, const BatchView& batch, std::vector<Tile>& tiles, int64_t query_heads,
                    RowsView q, float* o) {
    const auto length = [](const Tile& tile) { return tile.partitions * tile.rows * tile.group; };
    std::stable_sort(tiles.begin(), tiles.end(), [&](const Tile& a, const Tile& b) { return length(a) > length(b); });
    parallel_for(int64_t(tiles.size()), [&](int64_t i) {
        const Tile& tile = tiles[i];
        const int64_t n = tile.rows * tile.group;
        Scratch& scratch = thread_scratch(kv);
        const QueryTile query = load_tile(kv, batch, tile, q, scratch.q.data());
        const Partial total = partial_at(scratch.total.data(), n), part = partial_at(scratch.part.data(), n);
        clear(tile, kv, total);
        for (int64_t p = 0; p < tile.partitions; ++p) {
            attend_one(kv, query, p, part);
            kernels().merge(n, kv.padded_dim, total, part);
        }
        write_out(kv, tile, query_heads, total, o);
    });
}

// One task a partition, for few tiles over a long context; merged afterwards.
void attend_by_partition(const KvLayer& kv, const BatchView& batch, const std::vector<Tile>& tiles,
                         int64_t query_heads, RowsView q, float* o) {
    struct Part {
        int64_t tile, partition, at;  // where its sums begin
    };
    std::vector<Part> tasks;
    int64_t floats = 0;
    for (int64_t i = 0; i < int64_t(tiles.size()); ++i)
        for (int64_t p = 0; p < tiles[i].partitions; ++p) {
            tasks.push_back({i, p, floats});
            floats += partial_size(kv, tiles[i].rows * tiles[i].group);
        }
    std::vector<float> parts(floats);
    parallel_for(int64_t(tasks.size()), [&](int64_t i) {
        const Tile& tile = tiles[tasks[i].tile];
        const QueryTile query = load_tile(kv, batch, tile, q, thread_scratch(kv).q.data());
        attend_one(kv, query, tasks[i].partition, partial_at(parts.data() + tasks[i].at, tile.rows * tile.group));
    });
    Scratch& scratch = thread_scratch(kv);
    for (const Part& part : tasks) {
        const Tile& tile = tiles[part.tile];
        const int64_t n = tile.rows * tile.group;
        const Partial total = partial_at(scratch.total.data(), n);
        if (part.partition == 0) clear(tile, kv, total);
        kernels().merge(n, kv.padded_dim, total, partial_at(parts.data() + part.at, n));
        if (part.partition + 1 == tile.partitions) write_out(kv, tile, query_heads, total, o);
    }
}

}  // namespace

void attention(const KvLayer& kv, const BatchView& batch, int64_t query_heads, RowsView q, RowsView k, RowsView v,
               float* o) {
    store_rows(kv, batch, k, v);
    std::vector<Tile> tiles = list_tiles(kv, batch, query_heads);
    int64_t partitions = 0;
    for (const Tile& tile : tiles) partitions = std::max(partitions, tile.partitions);
    // many rows over a long context keep all threads busy as tiles, and need no memory for parts
    const bool few = int64_t(tiles.size()) < 8 * get_threads() && batch.starts[batch.n_seqs] <= 64;
    if (partitions > 1 && few)
        attend_by_partition(kv, batch, tiles, query_heads, q, o);
    else
        attend_by_tile(kv, batch, tiles, query_heads, q, o);
}

}  // namespace pronk
