// Splits a linear layer into tasks; the arithmetic is in matmul.cpp.
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "profile.h"
#include "threads.h"

namespace pronk {
namespace {

// Kept by the calling thread from one call to the next.
struct Buffers {
    std::vector<int8_t> q, fine;
    std::vector<RowBlock> blocks;
    std::vector<uint16_t> fine_rows;
    std::vector<int32_t> fine_count;
    std::vector<float> x;

    void reserve(size_t rows, size_t spans) {
        const size_t numbers = rows * spans * kSpanInputs;
        fine_count.resize(std::max(fine_count.size(), spans * kSpan));
        if (q.size() >= numbers) return;
        q.resize(numbers);
        fine.resize(numbers);
        blocks.resize(numbers / kBlock);
        fine_rows.resize(numbers / kBlock);
    }

    QuantizedRows view(int64_t rows, int64_t k) const {
        return {q.data(), fine.data(), blocks.data(), fine_rows.data(), fine_count.data(), rows, k};
    }
};

// Lists the rows with a fine part of each block of a span.
void list_fine_rows(Buffers& buffers, int64_t rows, int64_t k, int64_t span) {
    const int64_t n = std::min<int64_t>(kSpan, k / kBlock - span * kSpan);
    for (int64_t i = 0; i < n; ++i) {
        const RowBlock* block = buffers.blocks.data() + span * rows * kSpan + i;
        uint16_t* list = buffers.fine_rows.data() + (span * kSpan + i) * rows;
        int32_t count = 0;
        for (int64_t t = 0; t < rows; ++t) {  // without a branch: which rows have one is anybody's guess
            list[count] = uint16_t(t);
            count += block[t * kSpan].fine_sum != kNoFine;
        }
        buffers.fine_count[span * kSpan + i] = count;
    }
}

bool any_segment(const Weight& weight, bool dense) {
    return std::any_of(weight.segments.begin(), weight.segments.end(),
                       [&](const Segment& s) { return pack_info(s.pack).dense == dense; });
}

// Makes the rows, and rounds them or keeps them as floats or both, as the weight's segments want.
LinearInputs make_inputs(const Weight& weight, int64_t rows, const RowSource& source, Buffers& buffers) {
    const int64_t k = weight.k;
    const bool floats = any_segment(weight, true), integers = any_segment(weight, false);
    if (floats) buffers.x.resize(std::max(buffers.x.size(), size_t(rows * k)));
    if (integers) buffers.reserve(rows, spans_of(k));
    const auto one = [&](int64_t t) {
        thread_local std::vector<float> buffer;
        if (int64_t(buffer.size()) < k) buffer.resize(k);
        const float* row = source(t, buffer.data());
        if (floats) std::copy_n(row, k, buffers.x.data() + t * k);
        if (integers)
            kernels().quantize_row(row, k, rows, t, buffers.q.data(), buffers.fine.data(), buffers.blocks.data());
    };
    if (rows < 8) {  // less work than waking a thread
        for (int64_t t = 0; t < rows; ++t) one(t);
    } else {
        parallel_for((rows + 3) / 4, [&](int64_t task) {
            for (int64_t t = task * 4; t < std::min(rows, task * 4 + 4); ++t) one(t);
        });
    }
    if (integers) {
        const auto list = [&](int64_t span) { list_fine_rows(buffers, rows, k, span); };
        if (rows < 32)
            for (int64_t span = 0; span < spans_of(k); ++span) list(span);
        else
            parallel_for(spans_of(k), list);
    }
    return {buffers.x.data(), buffers.view(rows, k), rows, k};
}

// A few panels of a segment: the outputs of one call of linear_group.
struct Task {
    const Segment* segment;
    int64_t first_output;  // of the whole weight
    int64_t first_row;     // of the segment
    int64_t outputs;
};

std::vector<Task> list_tasks(const Weight& weight) {
    std::vector<Task> tasks;
    const int64_t group = kGroupRows;
    int64_t first = 0;
    for (const Segment& segment : weight.segments) {
        for (int64_t row = 0; row < segment.rows; row += group)
            tasks.push_back({&segment, first + row, row, std::min(group, segment.rows - row)});
        first += segment.rows;
    }
    return tasks;
}

// Outputs [rows][kGroupRows] of a task in memory of this thread; `slot` 0 and 1 do not overlap.
const float* compute(const Task& task, const LinearInputs& in, int slot) {
    thread_local std::vector<float> scratch[2];
    const size_t size = in.rows * kGroupRows;
    if (scratch[slot].size() < size) scratch[slot].resize(size);
    const Segment& segment = *task.segment;
    const uint8_t* panel = segment.panels + task.first_row / kPanel * panel_bytes(segment.pack, in.k);
    kernels().linear_group(segment.pack, in, panel, int((task.outputs + kPanel - 1) / kPanel), scratch[slot].data());
    return scratch[slot].data();
}

// body(i) for every i below n, a few to a claim: enough claims to even out, too few to contend.
template <class F>
void spread(int64_t n, const F& body) {
    const int64_t per_claim = std::max<int64_t>(1, n / (get_threads() * 16));
    parallel_for((n + per_claim - 1) / per_claim, [&](int64_t claim) {
        for (int64_t i = claim * per_claim; i < std::min(n, (claim + 1) * per_claim); ++i) body(i);
    });
}

// Passes of at most kMaxRows rows: pass(first row, inputs of the pass).
template <class F>
void for_passes(const Weight& weight, int64_t rows, const RowSource& source, const F& pass) {
    thread_local Buffers buffers;
    for (int64_t first = 0; first < rows; first += kMaxRows) {
        const RowSource shifted = [&](int64_t t, float* buffer) { return source(first + t, buffer); };
        LinearInputs in;
        {
            Timed timed(Op::Round);
            in = make_inputs(weight, std::min(kMaxRows, rows - first), shifted, buffers);
        }
        pass(first, in);
    }
}

}  // namespace

void linear(const Weight& weight, int64_t rows, const RowSource& source, float* y, bool add) {
    const std::vector<Task> tasks = list_tasks(weight);
    for_passes(weight, rows, source, [&](int64_t first, const LinearInputs& in) {
        spread(int64_t(tasks.size()), [&](int64_t i) {
            const Task& task = tasks[i];
            const float* out = compute(task, in, 0);
            for (int64_t t = 0; t < in.rows; ++t, out += kGroupRows) {
                float* to = y + (first + t) * weight.rows + task.first_output;
                if (add)
                    for (int64_t o = 0; o < task.outputs; ++o) to[o] += out[o];
                else
                    std::memcpy(to, out, task.outputs * sizeof(float));
            }
        });
    });
}

bool is_gate_and_up(const Weight& weight) {
    return weight.segments.size() == 2 && weight.segments[0].rows == weight.segments[1].rows;
}

void linear_swiglu(const Weight& gate_up, int64_t rows, const RowSource& source, float* y) {
    const std::vector<Task> tasks = list_tasks(gate_up);
    const int64_t pairs = int64_t(tasks.size()) / 2, width = gate_up.rows / 2;
    for_passes(gate_up, rows, source, [&](int64_t first, const LinearInputs& in) {
        spread(pairs, [&](int64_t i) {
            const Task& gate = tasks[i];
            const float *g = compute(gate, in, 0), *u = compute(tasks[pairs + i], in, 1);
            const int64_t group = kGroupRows;
            for (int64_t t = 0; t < in.rows; ++t)
                kernels().swiglu_row(gate.outputs, g + t * group, u + t * group, y + (first + t) * width + gate.first_row);
        });
    });
}

}  // namespace pronk
