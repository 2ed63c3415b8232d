// Ops that treat each row by itself, spread over threads where there is enough to do.
#include <algorithm>

#include "ops.h"
#include "threads.h"

namespace pronk {
namespace {

constexpr int64_t kWorthThreads = 1 << 15;  // numbers; below, waking a thread costs more than it saves

template <class F>
void for_rows(int64_t rows, int64_t numbers_per_row, F&& body) {
    if (rows * numbers_per_row < kWorthThreads) {
        for (int64_t t = 0; t < rows; ++t) body(t);
        return;
    }
    const int64_t per_task = std::max<int64_t>(1, kWorthThreads / 4 / numbers_per_row);
    parallel_for((rows + per_task - 1) / per_task, [&](int64_t task) {
        for (int64_t t = task * per_task; t < std::min(rows, (task + 1) * per_task); ++t) body(t);
    });
}

}  // namespace

void rms_norm(int64_t rows, int64_t dim, const float* x, const float* w, float eps, const float* residual,
              float* sum, float* y) {
    for_rows(rows, dim, [&](int64_t t) {
        const int64_t at = t * dim;
        kernels().rms_norm_row(dim, x + at, w, eps, residual ? residual + at : nullptr, sum ? sum + at : nullptr,
                               y + at);
    });
}

void swiglu(int64_t rows, int64_t width, const float* x, float* y) {
    for_rows(rows, width, [&](int64_t t) {
        kernels().swiglu_row(width, x + t * 2 * width, x + t * 2 * width + width, y + t * width);
    });
}

void rope(int64_t rows, int64_t heads, int64_t head_dim, RowsView x, const float* cos_sin, const int32_t* positions) {
    for_rows(rows, heads * head_dim, [&](int64_t t) {
        const float* angle = cos_sin + int64_t(positions[t]) * head_dim;
        for (int64_t h = 0; h < heads; ++h) {
            float* head = x.data + t * x.stride + h * head_dim;
            for (int64_t i = 0; i < head_dim; i += 2) {
                const float even = head[i], odd = head[i + 1], cosine = angle[i], sine = angle[i + 1];
                head[i] = even * cosine - odd * sine;
                head[i + 1] = even * sine + odd * cosine;
            }
        }
    });
}

}  // namespace pronk
