// Splits a linear layer into tasks; the arithmetic is in matmul.cpp.
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "threads.h"

namespace pronk {
namespace {

constexpr int64_t kMaxRows = 512;  // rows of one pass: bounds the scratch

// Kept by the calling thread from one call to the next.
struct Buffers {
    std::vector<int8_t> q, fine;
    std::vector<RowBlock> blocks;
};

QuantizedRows quantize(const float* x, int64_t rows, int64_t k, Buffers& buffers) {
    const size_t numbers = size_t(rows) * spans_of(k) * kSpanInputs;
    if (buffers.q.size() < numbers) {
        buffers.q.resize(numbers);
        buffers.fine.resize(numbers);
        buffers.blocks.resize(numbers / kBlock);
    }
    const auto one = [&](int64_t t) {
        kernels().quantize_row(x + t * k, k, rows, t, buffers.q.data(), buffers.fine.data(), buffers.blocks.data());
    };
    if (rows < 8) {  // less work than waking a thread
        for (int64_t t = 0; t < rows; ++t) one(t);
    } else {
        parallel_for(rows, one);
    }
    return {buffers.q.data(), buffers.fine.data(), buffers.blocks.data(), rows, k};
}

struct Task {
    const Segment* segment;
    int64_t first_output;  // of the whole weight
    int64_t first_row;     // of the segment
};

void run_task(const Weight& weight, const Task& task, const LinearInputs& in, float* y) {
    thread_local std::vector<float> scratch;
    const int group = kernels().group_rows;
    if (scratch.size() < size_t(in.rows * group)) scratch.resize(in.rows * group);
    const Segment& segment = *task.segment;
    const int64_t outputs = std::min<int64_t>(group, segment.rows - task.first_row);
    const uint8_t* panel = segment.panels + task.first_row / kPanel * panel_bytes(segment.pack, weight.k);
    kernels().linear_group(segment.pack, in, panel, int((outputs + kPanel - 1) / kPanel),
                           scratch.data());
    for (int64_t t = 0; t < in.rows; ++t)
        std::memcpy(y + t * weight.rows + task.first_output, scratch.data() + t * group, outputs * sizeof(float));
}

std::vector<Task> list_tasks(const Weight& weight) {
    std::vector<Task> tasks;
    int64_t first = 0;
    for (const Segment& segment : weight.segments) {
        for (int64_t row = 0; row < segment.rows; row += kernels().group_rows)
            tasks.push_back({&segment, first + row, row});
        first += segment.rows;
    }
    return tasks;
}

void linear_pass(const Weight& weight, int64_t rows, const float* x, float* y) {
    thread_local Buffers buffers;
    LinearInputs in{x, {}, rows, weight.k};
    const bool any_quantized = std::any_of(weight.segments.begin(), weight.segments.end(),
                                           [](const Segment& s) { return !pack_info(s.pack).dense; });
    if (any_quantized) in.quantized = quantize(x, rows, weight.k, buffers);
    const std::vector<Task> tasks = list_tasks(weight);
    // a few claims for each thread: enough to even out, few enough not to contend
    const int64_t n = int64_t(tasks.size());
    const int64_t per_claim = std::max<int64_t>(1, n / (get_threads() * 16));
    parallel_for((n + per_claim - 1) / per_claim, [&](int64_t claim) {
        for (int64_t i = claim * per_claim; i < std::min(n, (claim + 1) * per_claim); ++i)
            run_task(weight, tasks[i], in, y);
    });
}

}  // namespace

void linear(const Weight& weight, int64_t rows, const float* x, float* y) {
    for (int64_t t = 0; t < rows; t += kMaxRows)
        linear_pass(weight, std::min(kMaxRows, rows - t), x + t * weight.k, y + t * weight.rows);
}

}  // namespace pronk
