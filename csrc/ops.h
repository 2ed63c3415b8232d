// The ops that bindings.cpp offers to Python: they split work into tasks and call `kernels()`.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"

namespace pronk {

// Row t of what a linear layer reads: memory that is there, or computed into `buffer` [k]. Called by
// any thread, once for each row.
using RowSource = std::function<const float*(int64_t t, float* buffer)>;

// y[t][o] = sum over k of x[t][k] * weight[o][k], or added to y[t][o].
void linear(const Weight& weight, int64_t rows, const RowSource& x, float* y, bool add);

// y[t][f] = silu(gate[t][f]) * up[t][f], gate and up being the halves of what the weight gives.
// The weight must be one tensor stacked on another of as many rows.
void linear_swiglu(const Weight& gate_up, int64_t rows, const RowSource& x, float* y);
bool is_gate_and_up(const Weight& weight);

// y = x / rms(x) * w; with a residual, sum = x + residual is stored and normalized instead.
void rms_norm(int64_t rows, int64_t dim, const float* x, const float* w, float eps, const float* residual,
              float* sum, float* y);

// y[t][f] = silu(x[t][f]) * x[t][width + f]
void swiglu(int64_t rows, int64_t width, const float* x, float* y);

// Rotates adjacent pairs in place; cos_sin [positions][head_dim/2][2].
void rope(int64_t rows, int64_t heads, int64_t head_dim, RowsView x, const float* cos_sin,
          const int32_t* positions);

// Stores k and v at the rows' positions, then o = softmax(q k^T / sqrt(D)) v, causal; o [T][H][D].
void attention(const KvLayer& kv, const BatchView& batch, int64_t query_heads, RowsView q, RowsView k,
               RowsView v, float* o);

// Bytes per second that `threads` threads read from memory beyond the caches; multiply-accumulates
// of int8 per second that they compute in registers. Each measures for about `seconds`.
double measure_bandwidth(int threads, double seconds);
double measure_int8(int threads, double seconds);

}  // namespace pronk
