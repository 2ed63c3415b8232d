// The functions that exist once for each instruction set, and the table through which they are
// called. Plain C++ types only: bindings.cpp alone knows Python.
#pragma once

#include <cstdint>
#include <vector>

#include "layout.h"

namespace pronk {

// Rows of a weight that share one packed layout.
struct Segment {
    Pack pack;
    int64_t rows;            // real outputs; the last panel is padded with zeros
    const uint8_t* panels;   // (rows + 15) / 16 panels of panel_bytes(pack, k)
};

struct Weight {
    int64_t rows = 0, k = 0;
    std::vector<Segment> segments;  // stacked along the outputs
};

enum class KvType : int { F32, F16, I8 };

// Keys lie transposed, [block][G][D][32], so that 32 scores are computed side by side; values as
// [block][G][32][Dp], Dp = D rounded up to 16. I8: codes * scale, scales float [block][G][32], and four
// codes side by side: keys [block][G][Dp/4][32][4], 128 higher, values [block][G][32/4][Dp][4].
struct KvLayer {
    KvType type;
    int64_t n_blocks, heads, head_dim, padded_dim;
    uint8_t *k, *v;
    float *k_scale, *v_scale;
};

// Packed rows of a step; see backends/protocol.py: Batch.
struct BatchView {
    int64_t n_seqs, table_width;
    const int32_t* positions;  // [T]
    const int32_t* starts;     // [S + 1]
    const int32_t* lengths;    // [S]
    const int32_t* blocks;     // [S][table_width]
};

struct RowsView {  // rows of floats, `stride` floats apart
    float* data;
    int64_t stride;
};

// What a linear layer reads: the rows as they are (dense weights) and quantized (the others).
struct LinearInputs {
    const float* x;  // [rows][k]
    QuantizedRows quantized;
    int64_t rows, k;
};

// Query vectors of one sequence and key/value head that are computed together: `rows` successive
// rows times `group` heads, vector i being row i / group. q [rows * group][Dp], made by load_query.
struct QueryTile {
    const float* q;
    int64_t rows, group, head;
    int64_t first_position;  // of row 0
    int64_t length;          // positions that hold keys and values
    const int32_t* blocks;   // block table of the sequence
};

// Partial softmax sums of a tile: largest score, sum of exp(score - largest), weighted values.
struct Partial {
    float* largest;  // [vectors]
    float* sum;      // [vectors]
    float* values;   // [vectors][padded_dim]
};

constexpr int kTileVectors = 36;  // most query vectors of a tile
constexpr int kMaxHeadDim = 512;
constexpr int kReadWays = 4;  // of read_burst

// What exists once for each instruction set. These functions allocate nothing, start no thread and
// use no library template: one compiled for a newer ISA could replace its twin at link time.
struct Kernels {
    const char* name;
    // Outputs of `panels` successive panels for all rows: out [rows][kGroupRows].
    void (*linear_group)(Pack, const LinearInputs&, const uint8_t* panel, int panels, float* out);
    // Row t of `rows` rows of activations to integers, into the layout of QuantizedRows.
    void (*quantize_row)(const float* x, int64_t k, int64_t rows, int64_t t, int8_t* q, int8_t* fine, RowBlock* blocks);
    // y = x / rms(x) * w; with a residual, sum = x + residual is stored and normalized instead.
    void (*rms_norm_row)(int64_t dim, const float* x, const float* w, float eps, const float* residual,
                         float* sum, float* y);
    // y = silu(gate) * up
    void (*swiglu_row)(int64_t width, const float* gate, const float* up, float* y);
    // q [Dp] = x [D] * scale as `attend` wants it.
    void (*load_query)(const KvLayer&, const float* x, float scale, float* q);
    // Keys and values of one head over key/value blocks first..last-1 of the table (one partition).
    void (*attend)(const KvLayer&, const QueryTile&, int64_t first, int64_t last, const Partial&);
    // into = the merge of two partial sums over n vectors
    void (*merge)(int64_t n, int64_t padded_dim, const Partial& into, const Partial& other);
    // Stores row x [D] as key (value) of head g at offset `at` of a block.
    void (*store_key)(const KvLayer&, int64_t block, int64_t g, int64_t at, const float* x);
    void (*store_value)(const KvLayer&, int64_t block, int64_t g, int64_t at, const float* x);
    // For measuring the machine: int8 dot products in registers (returns multiply-accumulates), and
    // a sum over memory read in one of a few ways (returns bytes).
    int64_t (*int8_burst)(int64_t repeats);
    int64_t (*read_burst)(const uint8_t* data, size_t bytes, int way);
};

// The table of the best instruction set here, or of the one that PRONK_ISA names; throws
// std::runtime_error for a name that is unknown or not supported by this processor.
const Kernels& kernels();

namespace portable { extern const Kernels table; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels table; }
namespace avxvnni { extern const Kernels table; }
namespace avx512vnni { extern const Kernels table; }
#elif defined(__aarch64__)
namespace dotprod { extern const Kernels table; }
#endif

}  // namespace pronk
