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
    std::vector<float> x;

    void reserve(size_t numbers) {
        if (q.size() >= numbers) return;
        q.resize(numbers);
        fine.resize(numbers);
        blocks.resize(numbers / kBlock);
    }
};

bool any_segment(const Weight& weight, bool dense) {
    return std::any_of(weight.segments.begin(), weight.segments.end(),
                       [&](const Segment& s) { return pack_info(s.pack).dense == dense; });
}

// Makes the rows, and rounds them or keeps them as floats or both, as the weight's segments want.
LinearInputs make_inputs(const Weight& weight, int64_t rows, const RowSource& source, Buffers& buffers) {
    const int64_t k = weight.k;
    const bool floats = any_segment(weight, true), integers = any_segment(weight, false);
    if (floats) buffers.x.resize(std::max(buffers.x.size(), size_t(rows * k)));
    if (integers) buffers.reserve(size_t(rows) * spans_of(k) * kSpanInputs);
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
    return {buffers.x.data(), {buffers.q.data(), buffers.fine.data(), buffers.blocks.data(), rows, k, rows}, rows, k};
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
    const int64_t group = kernels().group_rows;
    int64_t first = 0;
    for (const Segment& segment : weight.segments) {
        for (int64_t row = 0; row < segment.rows; row += group)
            tasks.push_back({&segment, first + row, row, std::min(group, segment.rows - row)});
        first += segment.rows;
    }
    return tasks;
}

// Outputs [rows][group_rows] of a task in memory of this thread; `slot` 0 and 1 do not overlap.
const float* compute(const Task& task, const LinearInputs& in, int slot) {
    thread_local std::vector<float> scratch[2];
    const size_t size = in.rows * kernels().group_rows;
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

// Where a weight has too few outputs to keep all threads at work to the end, rows are cut, too: each
// piece of them is work of its own.
struct Cut {
    int64_t pieces, rows;  // of a piece

    Cut(int64_t all, int64_t tasks) {
        constexpr int64_t kFewest = 64;  // rows that make up for reading a weight once more
        const int64_t wanted = (get_threads() * 8 + tasks - 1) / tasks;
        pieces = get_threads() == 1 ? 1 : std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, all / kFewest));
        rows = (all + pieces - 1) / pieces;
        pieces = (all + rows - 1) / rows;
    }
};

LinearInputs piece(const LinearInputs& in, int64_t first, int64_t rows) {
    LinearInputs out = in;
    out.rows = out.quantized.rows = rows;
    if (out.x) out.x += first * in.k;
    if (out.quantized.q) {
        out.quantized.q += first * kSpanInputs;
        out.quantized.fine += first * kSpanInputs;
        out.quantized.blocks += first * kSpan;
    }
    return out;
}

// body(task, first row, inputs of a piece of the rows) for all tasks and pieces.
template <class F>
void spread_pieces(int64_t tasks, const LinearInputs& in, const F& body) {
    const Cut cut(in.rows, tasks);
    spread(tasks * cut.pieces, [&](int64_t i) {
        const int64_t first = i % cut.pieces * cut.rows;
        body(i / cut.pieces, first, piece(in, first, std::min(cut.rows, in.rows - first)));
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
        spread_pieces(int64_t(tasks.size()), in, [&](int64_t i, int64_t row, const LinearInputs& part) {
            const Task& task = tasks[i];
            const float* out = compute(task, part, 0);
            for (int64_t t = 0; t < part.rows; ++t, out += kernels().group_rows) {
                float* to = y + (first + row + t) * weight.rows + task.first_output;
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
        spread_pieces(pairs, in, [&](int64_t i, int64_t row, const LinearInputs& part) {
            const Task& gate = tasks[i];
            const float *g = compute(gate, part, 0), *u = compute(tasks[pairs + i], part, 1);
            const int64_t group = kernels().group_rows;
            for (int64_t t = 0; t < part.rows; ++t)
                kernels().swiglu_row(gate.outputs, g + t * group, u + t * group,
                                     y + (first + row + t) * width + gate.first_row);
        });
    });
}

}  // namespace pronk
