// The Python module `pronk.backends._cpu`: checks shapes and dtypes, releases the GIL, calls ops.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "memory.h"
#include "ops.h"
#include "pack.h"
#include "profile.h"
#include "stack.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace pronk;

template <int N>
using Floats = nb::ndarray<float, nb::ndim<N>, nb::device::cpu, nb::c_contig>;
template <int N>
using ConstFloats = nb::ndarray<const float, nb::ndim<N>, nb::device::cpu, nb::c_contig>;
template <int N>
using Ints = nb::ndarray<const int32_t, nb::ndim<N>, nb::device::cpu, nb::c_contig>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::device::cpu>;
using Run = nb::ndarray<const uint8_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;
using WritableRun = nb::ndarray<uint8_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;
// [T][heads][D], rows any stride apart: a slice of the merged q, k, v
using Heads = nb::ndarray<float, nb::ndim<3>, nb::device::cpu>;

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

RowsView rows_of(const Heads& x) {
    require(x.stride(2) == 1 && (x.shape(1) == 1 || x.stride(1) == int64_t(x.shape(2))),
            "heads of a row must lie side by side");
    return {x.data(), x.stride(0)};
}

const uint8_t* checked_rows(const Bytes& data, const KindInfo& info, int64_t k) {
    require(k > 0 && k % info.elements == 0, "columns are no multiple of the kind's block");
    require(int64_t(data.shape(1)) == k / info.elements * info.bytes, "row bytes do not match the columns");
    require(data.stride(1) == 1, "the bytes of a row must lie side by side");
    return data.data();
}

// A packed weight and the memory it lies in.
class PackedWeight {
  public:
    explicit PackedWeight(int64_t k) { weight_.k = k; }
    PackedWeight(const PackedWeight&) = delete;

    void append(int kind, const Bytes& data) {
        const KindInfo info = kind_info(kind);
        const uint8_t* from = checked_rows(data, info, weight_.k);
        const int64_t rows = data.shape(0), stride = data.stride(0);
        nb::gil_scoped_release release;
        Piece piece = allocate((rows + kPanel - 1) / kPanel * panel_bytes(info.pack, weight_.k));
        pack_rows(Kind(kind), from, stride, rows, weight_.k, piece.data);
        weight_.segments.push_back({info.pack, rows, piece.data});
        weight_.rows += rows;
        nbytes_ += piece.bytes;
        pieces_.push_back(std::move(piece));
    }

    // Rows that are packed already; the array stays where it is and is kept by reference.
    void append_packed(int pack, int64_t rows, const Run& data) {
        require(pack >= 0 && pack <= int(Pack::I8SM), "packed: no such layout");
        require(weight_.k > 0 && rows > 0, "packed: no rows or no columns");
        const PackInfo info = pack_info(Pack(pack));
        require(info.dense || weight_.k % (info.super_bytes ? kSuper : kBlock) == 0, "packed: columns are no multiple of the block");
        const size_t panel = panel_bytes(Pack(pack), weight_.k), bytes = data.shape(0);
        require(bytes % panel == 0 && bytes / panel == size_t((rows - 1) / kPanel + 1), "packed: bytes do not match the rows");
        require(reinterpret_cast<uintptr_t>(data.data()) % kAlign == 0, "packed: memory is not aligned");
        weight_.segments.push_back({Pack(pack), rows, data.data()});
        weight_.rows += rows;
        nbytes_ += bytes;
        runs_.push_back(data);
    }

    const Weight& weight() const { return weight_; }
    size_t nbytes() const { return nbytes_; }

  private:
    static constexpr size_t kAlign = 64;  // as for memory of our own: a line of codes is a cache line

    Weight weight_;
    std::vector<Piece> pieces_;
    std::vector<Run> runs_;
    size_t nbytes_ = 0;
};

// Layout, rows and bytes of each segment of a weight; what append_packed takes.
nb::list py_packed(nb::handle self) {
    const Weight& weight = nb::cast<const PackedWeight&>(self).weight();
    nb::list segments;
    for (const Segment& segment : weight.segments) {
        const size_t panels = (segment.rows + kPanel - 1) / kPanel;
        nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>> bytes(segment.panels, {panels * panel_bytes(segment.pack, weight.k)}, self);
        segments.append(nb::make_tuple(int(segment.pack), segment.rows, bytes));
    }
    return segments;
}

uint64_t py_checksum(const Run& data) {
    nb::gil_scoped_release release;
    return checksum(data.data(), data.shape(0));
}

// Keys and values of one layer.
class KvMemory {
  public:
    KvMemory(int64_t n_blocks, int64_t heads, int64_t head_dim, const std::string& dtype) {
        require(n_blocks > 0 && heads > 0 && head_dim > 0 && head_dim <= kMaxHeadDim, "kv: sizes out of range");
        const KvType type = dtype == "f32" ? KvType::F32 : dtype == "f16" ? KvType::F16 : KvType::I8;
        require(type != KvType::I8 || dtype == "int8", "kv: dtype must be f32, f16 or int8");
        const int64_t width = type == KvType::F32 ? 4 : type == KvType::F16 ? 2 : 1;
        const int64_t padded = (head_dim + 15) / 16 * 16, rows = n_blocks * heads * kKvBlock;
        k_ = std::make_unique<Memory>(rows * (type == KvType::I8 ? padded : head_dim) * width);
        v_ = std::make_unique<Memory>(rows * padded * width);
        if (type == KvType::I8) scales_ = std::make_unique<Memory>(2 * rows * sizeof(float));
        float* scales = scales_ ? reinterpret_cast<float*>(scales_->data()) : nullptr;
        kv_ = {type, n_blocks, heads, head_dim, padded, k_->data(), v_->data(), scales, scales ? scales + rows : nullptr};
    }

    const KvLayer& kv() const { return kv_; }
    size_t nbytes() const { return k_->size() + v_->size() + (scales_ ? scales_->size() : 0); }
    size_t block_bytes() const { return nbytes() / kv_.n_blocks; }

    // All that is stored of the positions of one block: keys, values, and scales where there are any.
    void read_block(int64_t block, const WritableRun& out) const {
        check_block(block, out.shape(0));
        uint8_t* to = out.data();
        nb::gil_scoped_release release;
        each_part(block, [&](uint8_t* part, size_t bytes) {
            std::memcpy(to, part, bytes);
            to += bytes;
        });
    }

    void write_block(int64_t block, const Run& data) {
        check_block(block, data.shape(0));
        const uint8_t* from = data.data();
        nb::gil_scoped_release release;
        each_part(block, [&](uint8_t* part, size_t bytes) {
            std::memcpy(part, from, bytes);
            from += bytes;
        });
    }

  private:
    void check_block(int64_t block, size_t bytes) const {
        require(block >= 0 && block < kv_.n_blocks, "kv: block outside the cache");
        require(bytes == block_bytes(), "kv: not as many bytes as a block has");
    }

    // Calls use(part, bytes) for what a block has in each of the arrays.
    template <class Use>
    void each_part(int64_t block, const Use& use) const {
        const auto part = [&](uint8_t* array, size_t array_bytes) {
            const size_t bytes = array_bytes / kv_.n_blocks;
            use(array + block * bytes, bytes);
        };
        part(k_->data(), k_->size());
        part(v_->data(), v_->size());
        if (!scales_) return;
        const size_t half = scales_->size() / 2;
        part(scales_->data(), half);
        part(scales_->data() + half, half);
    }

    std::unique_ptr<Memory> k_, v_, scales_;
    KvLayer kv_;
};

void py_linear(const PackedWeight& weight, const ConstFloats<2>& x, const Floats<2>& y) {
    const Weight& w = weight.weight();
    require(int64_t(x.shape(1)) == w.k, "linear: x has the wrong width");
    require(y.shape(0) == x.shape(0) && int64_t(y.shape(1)) == w.rows, "linear: y has the wrong shape");
    nb::gil_scoped_release release;
    Timed timed(Op::Other);
    linear(w, x.shape(0), [&](int64_t t, float*) { return x.data() + t * w.k; }, y.data(), false);
}

void py_rms_norm(const ConstFloats<2>& x, const ConstFloats<1>& w, float eps, const Floats<2>& y) {
    require(x.shape(1) == w.shape(0) && x.shape(0) == y.shape(0) && x.shape(1) == y.shape(1), "rms_norm: shapes differ");
    nb::gil_scoped_release release;
    rms_norm(x.shape(0), x.shape(1), x.data(), w.data(), eps, nullptr, nullptr, y.data());
}

void py_add_rms_norm(const ConstFloats<2>& x, const ConstFloats<2>& residual, const ConstFloats<1>& w, float eps,
                     const Floats<2>& sum, const Floats<2>& y) {
    const size_t rows = x.shape(0), dim = x.shape(1);
    require(dim == w.shape(0) && residual.shape(0) == rows && residual.shape(1) == dim && sum.shape(0) == rows &&
                sum.shape(1) == dim && y.shape(0) == rows && y.shape(1) == dim,
            "rms_norm: shapes differ");
    nb::gil_scoped_release release;
    rms_norm(rows, dim, x.data(), w.data(), eps, residual.data(), sum.data(), y.data());
}

void py_swiglu(const ConstFloats<2>& x, const Floats<2>& y) {
    require(x.shape(0) == y.shape(0) && x.shape(1) == 2 * y.shape(1), "swiglu: shapes differ");
    nb::gil_scoped_release release;
    swiglu(y.shape(0), y.shape(1), x.data(), y.data());
}

void py_rope(const Heads& x, const ConstFloats<3>& cos_sin, const Ints<1>& positions) {
    require(positions.shape(0) == x.shape(0) && 2 * cos_sin.shape(1) == x.shape(2) && cos_sin.shape(2) == 2,
            "rope: shapes differ");
    for (size_t t = 0; t < positions.shape(0); ++t)
        require(positions(t) >= 0 && positions(t) < int64_t(cos_sin.shape(0)), "rope: position outside the table");
    const RowsView view = rows_of(x);
    nb::gil_scoped_release release;
    rope(x.shape(0), x.shape(1), x.shape(2), view, cos_sin.data(), positions.data());
}

void check_batch(const KvLayer& kv, const BatchView& batch, int64_t rows) {
    require(batch.starts[0] == 0 && batch.starts[batch.n_seqs] == rows, "attention: starts do not cover the rows");
    for (int64_t s = 0; s < batch.n_seqs; ++s) {
        const int64_t length = batch.lengths[s];
        require(batch.starts[s] <= batch.starts[s + 1], "attention: starts must rise");
        require(length <= batch.table_width * kKvBlock, "attention: block table is too short");
        for (int64_t t = batch.starts[s]; t < batch.starts[s + 1]; ++t)
            require(batch.positions[t] == length - (batch.starts[s + 1] - t), "attention: rows must be a sequence's last");
        for (int64_t b = 0; b * kKvBlock < length; ++b) {
            const int64_t block = batch.blocks[s * batch.table_width + b];
            require(block >= 0 && block < kv.n_blocks, "attention: block outside the cache");
        }
        require(batch.starts[s] == batch.starts[s + 1] || batch.positions[batch.starts[s]] >= 0,
                "attention: more rows than positions");
    }
}

void py_attention(const Heads& q, const Heads& k, const Heads& v, const KvMemory& memory, const Ints<1>& positions,
                  const Ints<1>& starts, const Ints<1>& lengths, const Ints<2>& blocks, const Floats<3>& o) {
    const KvLayer& kv = memory.kv();
    const int64_t rows = q.shape(0), heads = q.shape(1);
    require(int64_t(q.shape(2)) == kv.head_dim && int64_t(k.shape(2)) == kv.head_dim && int64_t(v.shape(2)) == kv.head_dim,
            "attention: head size differs from the cache's");
    require(int64_t(k.shape(1)) == kv.heads && int64_t(v.shape(1)) == kv.heads && heads % kv.heads == 0,
            "attention: heads do not match the cache's");
    require(int64_t(k.shape(0)) == rows && int64_t(v.shape(0)) == rows && int64_t(positions.shape(0)) == rows &&
                int64_t(o.shape(0)) == rows && o.shape(1) == q.shape(1) && o.shape(2) == q.shape(2),
            "attention: rows differ");
    const int64_t seqs = lengths.shape(0);
    require(int64_t(starts.shape(0)) == seqs + 1 && int64_t(blocks.shape(0)) == seqs, "attention: sequences differ");
    const BatchView batch{seqs, int64_t(blocks.shape(1)), positions.data(), starts.data(), lengths.data(), blocks.data()};
    check_batch(kv, batch, rows);
    const RowsView q_rows = rows_of(q), k_rows = rows_of(k), v_rows = rows_of(v);
    nb::gil_scoped_release release;
    attention(kv, batch, heads, q_rows, k_rows, v_rows, o.data());
}

void py_dequantize(int kind, const Bytes& data, const Floats<2>& out) {
    const int64_t k = out.shape(1), stride = data.stride(0);
    const uint8_t* from = checked_rows(data, kind_info(kind), k);
    require(data.shape(0) == out.shape(0), "dequantize: rows differ");
    nb::gil_scoped_release release;
    for (int64_t t = 0; t < int64_t(out.shape(0)); ++t) dequantize_row(Kind(kind), from + t * stride, k, out.data() + t * k);
}

void py_embed(int kind, const Bytes& table, const Ints<1>& ids, const Floats<2>& out) {
    const int64_t k = out.shape(1), stride = table.stride(0);
    const uint8_t* from = checked_rows(table, kind_info(kind), k);
    require(ids.shape(0) == out.shape(0), "embed: rows differ");
    for (size_t t = 0; t < ids.shape(0); ++t)
        require(ids(t) >= 0 && ids(t) < int64_t(table.shape(0)), "embed: token id outside the table");
    nb::gil_scoped_release release;
    for (size_t t = 0; t < ids.shape(0); ++t) dequantize_row(Kind(kind), from + ids(t) * stride, k, out.data() + t * k);
}

// The blocks of a model. Python objects that own the memory are kept by reference.
class PyStack {
  public:
    PyStack(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t ffn_dim, float eps, const ConstFloats<1>& norm,
            const ConstFloats<3>& cos_sin)
        : norm_(norm), cos_sin_(cos_sin) {
        require(kv_heads > 0 && heads % kv_heads == 0, "stack: heads do not divide");
        require(2 * int64_t(cos_sin.shape(1)) == head_dim && cos_sin.shape(2) == 2, "stack: cos_sin has the wrong shape");
        stack_ = {int64_t(norm.shape(0)), heads, kv_heads, head_dim, ffn_dim, eps, norm.data(), cos_sin.data(), {}};
    }

    void append(const ConstFloats<1>& attn_norm, nb::object wqkv, nb::object wo, const ConstFloats<1>& ffn_norm,
                nb::object w_gate_up, nb::object w_down) {
        const auto weight = [&](const nb::object& o, int64_t rows, int64_t k) {
            const Weight& w = nb::cast<PackedWeight&>(o).weight();
            require(w.rows == rows && w.k == k, "stack: a weight has the wrong shape");
            owners_.push_back(o);
            return &w;
        };
        const int64_t dim = stack_.dim, width = stack_.heads * stack_.head_dim, ffn = stack_.ffn_dim;
        require(int64_t(attn_norm.shape(0)) == dim && int64_t(ffn_norm.shape(0)) == dim, "stack: a norm has the wrong size");
        Layer layer{attn_norm.data(),
                    weight(wqkv, width + 2 * stack_.kv_heads * stack_.head_dim, dim),
                    weight(wo, dim, width),
                    ffn_norm.data(),
                    weight(w_gate_up, 2 * ffn, dim),
                    weight(w_down, dim, ffn)};
        require(is_gate_and_up(*layer.w_gate_up), "stack: gate and up must be one tensor each");
        vectors_.push_back(attn_norm);
        vectors_.push_back(ffn_norm);
        stack_.layers.push_back(layer);
    }

    void run(const std::vector<const KvMemory*>& memories, const Ints<1>& positions, const Ints<1>& starts,
             const Ints<1>& lengths, const Ints<2>& blocks, const ConstFloats<2>& x, const std::optional<Ints<1>>& wanted,
             const Floats<2>& out) const {
        const int64_t rows = x.shape(0), seqs = lengths.shape(0);
        require(memories.size() == stack_.layers.size(), "stack: a cache for each layer is needed");
        require(int64_t(x.shape(1)) == stack_.dim && int64_t(out.shape(1)) == stack_.dim, "stack: rows have the wrong width");
        require(int64_t(positions.shape(0)) == rows && int64_t(starts.shape(0)) == seqs + 1 &&
                    int64_t(blocks.shape(0)) == seqs && seqs > 0,
                "stack: batch does not fit the rows");
        require(out.shape(0) == (wanted ? wanted->shape(0) : x.shape(0)), "stack: out has the wrong number of rows");
        for (size_t i = 0; wanted && i < wanted->shape(0); ++i)
            require((*wanted)(i) >= (i ? (*wanted)(i - 1) + 1 : 0) && (*wanted)(i) < rows, "stack: wanted rows must rise");
        for (size_t t = 0; t < positions.shape(0); ++t)
            require(positions(t) >= 0 && positions(t) < int64_t(cos_sin_.shape(0)), "rope: position outside the table");
        const BatchView batch{seqs, int64_t(blocks.shape(1)), positions.data(), starts.data(), lengths.data(), blocks.data()};
        std::vector<const KvLayer*> kv;
        for (const KvMemory* memory : memories) {
            require(memory->kv().heads == stack_.kv_heads && memory->kv().head_dim == stack_.head_dim,
                    "attention: heads do not match the cache's");
            kv.push_back(&memory->kv());
        }
        if (!kv.empty()) check_batch(*kv[0], batch, rows);
        for (const KvLayer* layer : kv) require(layer->n_blocks == kv[0]->n_blocks, "stack: caches differ in size");
        nb::gil_scoped_release release;
        run_stack(stack_, kv, batch, x.data(), rows, wanted ? wanted->data() : nullptr, int64_t(out.shape(0)), out.data());
    }

  private:
    Stack stack_;
    ConstFloats<1> norm_;
    ConstFloats<3> cos_sin_;
    std::vector<nb::object> owners_;
    std::vector<ConstFloats<1>> vectors_;
};

// Seconds of each operation since the last call, on the calling thread.
nb::dict py_take_profile() {
    nb::dict seconds;
    for (int op = 0; op < kOps; ++op) seconds[kOpNames[op]] = profile()[op];
    profile().fill(0);
    return seconds;
}

int64_t py_packed_bytes(int kind, int64_t rows, int64_t k) {
    return (rows + kPanel - 1) / kPanel * panel_bytes(kind_info(kind).pack, k);
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("set_threads", &set_threads, "n"_a, nb::call_guard<nb::gil_scoped_release>());
    m.def("get_threads", &get_threads);
    m.def("hardware_threads", &hardware_threads);
    m.attr("LAYOUT_VERSION") = kLayoutVersion;
    m.def("checksum", &py_checksum, "data"_a.noconvert());
    m.def("packed_bytes", &py_packed_bytes, "kind"_a, "rows"_a, "k"_a);
    m.def("measure_bandwidth", &measure_bandwidth, "threads"_a, "seconds"_a, nb::call_guard<nb::gil_scoped_release>());
    m.def("measure_int8", &measure_int8, "threads"_a, "seconds"_a, nb::call_guard<nb::gil_scoped_release>());

    nb::class_<PackedWeight>(m, "PackedWeight")
        .def(nb::init<int64_t>(), "k"_a)
        .def("append", &PackedWeight::append, "kind"_a, "data"_a)
        .def("append_packed", &PackedWeight::append_packed, "pack"_a, "rows"_a, "data"_a.noconvert())
        .def_prop_ro("packed", &py_packed)
        .def_prop_ro("rows", [](const PackedWeight& w) { return w.weight().rows; })
        .def_prop_ro("k", [](const PackedWeight& w) { return w.weight().k; })
        .def_prop_ro("nbytes", &PackedWeight::nbytes);
    nb::class_<KvMemory>(m, "KvMemory")
        .def(nb::init<int64_t, int64_t, int64_t, const std::string&>(), "n_blocks"_a, "heads"_a, "head_dim"_a, "dtype"_a)
        .def_prop_ro("nbytes", &KvMemory::nbytes)
        .def_prop_ro("block_bytes", &KvMemory::block_bytes)
        .def("read_block", &KvMemory::read_block, "block"_a, "out"_a.noconvert())
        .def("write_block", &KvMemory::write_block, "block"_a, "data"_a.noconvert());

    nb::class_<PyStack>(m, "Stack")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, float, const ConstFloats<1>&, const ConstFloats<3>&>(), "heads"_a,
             "kv_heads"_a, "head_dim"_a, "ffn_dim"_a, "eps"_a, "norm"_a.noconvert(), "cos_sin"_a.noconvert())
        .def("append", &PyStack::append, "attn_norm"_a.noconvert(), "wqkv"_a, "wo"_a, "ffn_norm"_a.noconvert(),
             "w_gate_up"_a, "w_down"_a)
        .def("run", &PyStack::run, "kv"_a, "positions"_a.noconvert(), "starts"_a.noconvert(), "lengths"_a.noconvert(),
             "blocks"_a.noconvert(), "x"_a.noconvert(), "wanted"_a.noconvert().none(), "out"_a.noconvert());
    m.def("take_profile", &py_take_profile);

    m.def("linear", &py_linear, "weight"_a, "x"_a.noconvert(), "y"_a.noconvert());
    m.def("rms_norm", &py_rms_norm, "x"_a.noconvert(), "w"_a.noconvert(), "eps"_a, "y"_a.noconvert());
    m.def("add_rms_norm", &py_add_rms_norm, "x"_a.noconvert(), "residual"_a.noconvert(), "w"_a.noconvert(), "eps"_a,
          "sum"_a.noconvert(), "y"_a.noconvert());
    m.def("swiglu", &py_swiglu, "x"_a.noconvert(), "y"_a.noconvert());
    m.def("rope", &py_rope, "x"_a.noconvert(), "cos_sin"_a.noconvert(), "positions"_a.noconvert());
    m.def("attention", &py_attention, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "kv"_a,
          "positions"_a.noconvert(), "starts"_a.noconvert(), "lengths"_a.noconvert(), "blocks"_a.noconvert(),
          "o"_a.noconvert());
    m.def("dequantize", &py_dequantize, "kind"_a, "data"_a.noconvert(), "out"_a.noconvert());
    m.def("embed", &py_embed, "kind"_a, "table"_a.noconvert(), "ids"_a.noconvert(), "out"_a.noconvert());
}
