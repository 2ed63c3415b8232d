// All transformer blocks in one call: model/llama.py's forward_hidden after the embedding, with the
// norms folded into the rounding of activations, the residual added where a projection ends, and
// SwiGLU applied to gate and up as they are computed. Same numbers, bit for bit.
#include "stack.h"

#include <algorithm>

#include "profile.h"
#include "threads.h"

namespace pronk {
namespace {

// Kept by the calling thread: activations of a step, as large as the largest step so far.
struct Workspace {
    std::vector<float> residual, qkv, attended, hidden;

    void reserve(const Stack& s, int64_t rows) {
        grow(residual, rows * s.dim);
        grow(qkv, rows * (s.heads + 2 * s.kv_heads) * s.head_dim);
        grow(attended, rows * s.heads * s.head_dim);
        grow(hidden, rows * s.ffn_dim);
    }

    static void grow(std::vector<float>& v, int64_t n) {
        if (int64_t(v.size()) < n) v.resize(n);
    }
};

RowSource normalized(const Stack& s, const float* x, const float* w) {
    return [&s, x, w](int64_t t, float* buffer) -> const float* {
        kernels().rms_norm_row(s.dim, x + t * s.dim, w, s.eps, nullptr, nullptr, buffer);
        return buffer;
    };
}

RowSource plain(const float* x, int64_t width) {
    return [x, width](int64_t t, float*) { return x + t * width; };
}

void attend(const Stack& s, const Layer& layer, const KvLayer& kv, const BatchView& batch, int64_t rows, Workspace& work) {
    const int64_t heads = s.heads, groups = s.kv_heads, width = s.head_dim, stride = (heads + 2 * groups) * width;
    float* qkv = work.qkv.data();
    {
        Timed timed(Op::Qkv);
        linear(*layer.wqkv, rows, normalized(s, work.residual.data(), layer.attn_norm), qkv, false);
    }
    {
        Timed timed(Op::Rope);  // queries and keys lie side by side
        rope(rows, heads + groups, width, {qkv, stride}, s.cos_sin, batch.positions);
    }
    Timed timed(Op::Attention);
    attention(kv, batch, heads, {qkv, stride}, {qkv + heads * width, stride}, {qkv + (heads + groups) * width, stride},
              work.attended.data());
}

void keep_rows(const int32_t* wanted, int64_t n, int64_t width, float* x) {
    for (int64_t i = 0; i < n; ++i) std::copy_n(x + wanted[i] * width, width, x + i * width);
}

void feed_forward(const Stack& s, const Layer& layer, int64_t rows, Workspace& work) {
    float* residual = work.residual.data();
    {
        Timed timed(Op::Output);
        linear(*layer.wo, rows, plain(work.attended.data(), s.heads * s.head_dim), residual, true);
    }
    {
        Timed timed(Op::GateUp);
        linear_swiglu(*layer.w_gate_up, rows, normalized(s, residual, layer.ffn_norm), work.hidden.data());
    }
    Timed timed(Op::Down);
    linear(*layer.w_down, rows, plain(work.hidden.data(), s.ffn_dim), residual, true);
}

}  // namespace

void run_stack(const Stack& s, const std::vector<const KvLayer*>& kv, const BatchView& batch, const float* x,
               int64_t rows, const int32_t* wanted, int64_t n_wanted, float* out) {
    static thread_local Workspace work;
    work.reserve(s, rows);
    std::copy_n(x, rows * s.dim, work.residual.data());
    for (size_t i = 0; i < s.layers.size(); ++i) {
        attend(s, s.layers[i], *kv[i], batch, rows, work);
        if (wanted && i + 1 == s.layers.size()) {  // keys and values of all rows are stored; the rest is for a few
            keep_rows(wanted, n_wanted, s.dim, work.residual.data());
            keep_rows(wanted, n_wanted, s.heads * s.head_dim, work.attended.data());
            rows = n_wanted;
        }
        feed_forward(s, s.layers[i], rows, work);
    }
    for (int64_t t = 0; t < rows; ++t)
        kernels().rms_norm_row(s.dim, work.residual.data() + t * s.dim, s.norm, s.eps, nullptr, nullptr, out + t * s.dim);
}

}  // namespace pronk
