// A model's transformer blocks as native code runs them.
#pragma once

#include <vector>

#include "ops.h"

namespace pronk {

struct Layer {
    const float* attn_norm;  // [D]
    const Weight *wqkv, *wo;
    const float* ffn_norm;  // [D]
    const Weight *w_gate_up, *w_down;
};

struct Stack {
    int64_t dim, heads, kv_heads, head_dim, ffn_dim;
    float eps;
    const float *norm, *cos_sin;  // [D], [positions][head_dim/2][2]
    std::vector<Layer> layers;
};

// out [n_wanted][D] = normalized hidden states of the wanted rows (ascending; null: of all rows) for
// the embeddings x [rows][D]. Keys and values of all rows are stored, a cache for each layer.
void run_stack(const Stack& stack, const std::vector<const KvLayer*>& kv, const BatchView& batch, const float* x,
               int64_t rows, const int32_t* wanted, int64_t n_wanted, float* out);

}  // namespace pronk
