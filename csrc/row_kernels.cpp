// Norm, activation and the loops that measure the machine. Compiled once for each ISA; also the
// table of this ISA's functions.
#include "kernels.h"
#include "simd.h"

namespace pronk::PRONK_ISA {

void linear_group(Pack, const LinearInputs&, const uint8_t*, int, float*);
void quantize_row(const float*, int64_t, int64_t, int64_t, int8_t*, int8_t*, RowBlock*);
void load_query(const KvLayer&, const float*, float, float*);
void attend(const KvLayer&, const QueryTile&, int64_t, int64_t, const Partial&);
void merge(int64_t, int64_t, const Partial&, const Partial&);
void store_key(const KvLayer&, int64_t, int64_t, int64_t, const float*);
void store_value(const KvLayer&, int64_t, int64_t, int64_t, const float*);

namespace {

void rms_norm_row(int64_t dim, const float* x, const float* w, float eps, const float* residual, float* sum,
                  float* y) {
    vf squares[4] = {};
    float tail = 0;
    int64_t i = 0;
    const float* from = x;
    if (residual) {
        for (; i + W <= dim; i += W) store(sum + i, load_f32(x + i) + load_f32(residual + i));
        for (; i < dim; ++i) sum[i] = x[i] + residual[i];
        from = sum;
    }
    for (i = 0; i + 4 * W <= dim; i += 4 * W)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const vf value = load_f32(from + i + v * W);
            squares[v] = fma(value, value, squares[v]);
        }
    for (; i < dim; ++i) tail += from[i] * from[i];
    const float total = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])) + tail;
    const float inverse = 1.0f / __builtin_sqrtf(total / float(dim) + eps);
    for (i = 0; i + W <= dim; i += W) store(y + i, load_f32(from + i) * inverse * load_f32(w + i));
    for (; i < dim; ++i) y[i] = from[i] * inverse * w[i];
}

void swiglu_row(int64_t width, const float* gate, const float* up, float* y) {
    int64_t i = 0;
    for (; i + W <= width; i += W) {
        const vf g = load_f32(gate + i);
        store(y + i, g / (1.0f + exp(-g)) * load_f32(up + i));
    }
    for (; i < width; ++i) y[i] = gate[i] / (1.0f + exp(splat(-gate[i]))[0]) * up[i];
}

// Sums of dot products, more than latency times ports, that nothing but registers feeds. The assembly keeps the compiler
// from moving sums to the stack, which would measure the stack.
int64_t int8_burst(int64_t repeats) {
#if defined(PRONK_VNNI_256)
    constexpr int kSums = 12;  // there are 16 registers
#else
    constexpr int kSums = 16;
#endif
    [[maybe_unused]] int64_t macs = repeats * kSums * W * 4;
#if defined(PRONK_VNNI_512)
    __m512i u = _mm512_set1_epi8(3), s = _mm512_set1_epi8(-2);
    for (int64_t i = 0; i < repeats; ++i)
        asm volatile(
            "vpdpbusd %1, %0, %%zmm0\n vpdpbusd %1, %0, %%zmm1\n vpdpbusd %1, %0, %%zmm2\n"
            "vpdpbusd %1, %0, %%zmm3\n vpdpbusd %1, %0, %%zmm4\n vpdpbusd %1, %0, %%zmm5\n"
            "vpdpbusd %1, %0, %%zmm6\n vpdpbusd %1, %0, %%zmm7\n vpdpbusd %1, %0, %%zmm8\n"
            "vpdpbusd %1, %0, %%zmm9\n vpdpbusd %1, %0, %%zmm10\n vpdpbusd %1, %0, %%zmm11\n"
            "vpdpbusd %1, %0, %%zmm12\n vpdpbusd %1, %0, %%zmm13\n vpdpbusd %1, %0, %%zmm14\n"
            "vpdpbusd %1, %0, %%zmm15\n" ::"v"(u), "v"(s)
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
              "xmm12", "xmm13", "xmm14", "xmm15");
    return macs;
#elif defined(PRONK_VNNI_256)
    __m256i u = _mm256_set1_epi8(3), s = _mm256_set1_epi8(-2);
#if !defined(PRONK_AVXVNNI_BY_AVX512)
#define PRONK_DOT "%{vex%} vpdpbusd %1, %0, "
#else
#define PRONK_DOT "vpdpbusd %1, %0, "
#endif
    for (int64_t i = 0; i < repeats; ++i)
        asm volatile(
            PRONK_DOT "%%ymm0\n" PRONK_DOT "%%ymm1\n" PRONK_DOT "%%ymm2\n" PRONK_DOT "%%ymm3\n"
            PRONK_DOT "%%ymm4\n" PRONK_DOT "%%ymm5\n" PRONK_DOT "%%ymm6\n" PRONK_DOT "%%ymm7\n"
            PRONK_DOT "%%ymm8\n" PRONK_DOT "%%ymm9\n" PRONK_DOT "%%ymm10\n" PRONK_DOT "%%ymm11\n"
            ::"x"(u), "x"(s)
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11");
    return macs;
#elif defined(PRONK_MADDUBS)
    // The fastest way without VNNI: products of codes up to 15, as 4-bit weights have, are summed in 16
    // bits eight times before they are widened.
    __m256i u = _mm256_set1_epi8(3), s = _mm256_set1_epi8(-2), one = _mm256_set1_epi16(1);
    for (int64_t i = 0; i < repeats; ++i)
        asm volatile(
            "vpmaddubsw %1, %0, %%ymm4\n vpmaddubsw %1, %0, %%ymm5\n"
            ".rept 7\n"
            "vpmaddubsw %1, %0, %%ymm6\n vpmaddubsw %1, %0, %%ymm7\n"
            "vpaddw %%ymm6, %%ymm4, %%ymm4\n vpaddw %%ymm7, %%ymm5, %%ymm5\n"
            ".endr\n"
            "vpmaddwd %2, %%ymm4, %%ymm4\n vpmaddwd %2, %%ymm5, %%ymm5\n"
            "vpaddd %%ymm4, %%ymm0, %%ymm0\n vpaddd %%ymm5, %%ymm1, %%ymm1\n" ::"x"(u), "x"(s), "x"(one)
            : "xmm0", "xmm1", "xmm4", "xmm5", "xmm6", "xmm7");
    return macs;
#elif defined(PRONK_DOTPROD)
    const int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(-2);
    for (int64_t i = 0; i < repeats; ++i)
        asm volatile(
            "sdot v16.4s, %0.16b, %1.16b\n sdot v17.4s, %0.16b, %1.16b\n sdot v18.4s, %0.16b, %1.16b\n"
            "sdot v19.4s, %0.16b, %1.16b\n sdot v20.4s, %0.16b, %1.16b\n sdot v21.4s, %0.16b, %1.16b\n"
            "sdot v22.4s, %0.16b, %1.16b\n sdot v23.4s, %0.16b, %1.16b\n sdot v24.4s, %0.16b, %1.16b\n"
            "sdot v25.4s, %0.16b, %1.16b\n sdot v26.4s, %0.16b, %1.16b\n sdot v27.4s, %0.16b, %1.16b\n"
            "sdot v28.4s, %0.16b, %1.16b\n sdot v29.4s, %0.16b, %1.16b\n sdot v30.4s, %0.16b, %1.16b\n"
            "sdot v31.4s, %0.16b, %1.16b\n" ::"w"(a), "w"(b)
            : "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30",
              "v31");
    return macs;
#else
    // what the compiler makes of dot4; codes that change keep it from computing products once
    vi total{};
    vb codes = vb{} + uint8_t(3);
    for (int64_t i = 0; i < repeats * kSums; ++i) {
        codes += uint8_t(7);
        total = dot4(total, codes, int32_t(i));
    }
    asm volatile("" : : "m"(total));
    return macs;
#endif
}

// Reads every byte in streams side by side, with prefetches `ahead` bytes ahead of each: into the L1
// cache (locality 3) or the L2 cache (2).
template <int kStreams, int kAhead, int kLocality>
int64_t read_streams(const uint8_t* data, size_t bytes) {
    const size_t stream = bytes / kStreams / 64 * 64;
    vi sums[kStreams] = {};
    for (size_t i = 0; i < stream; i += 64)
#pragma GCC unroll 8
        for (int s = 0; s < kStreams; ++s) {
            const uint8_t* p = data + s * stream + i;
            __builtin_prefetch(p + kAhead, 0, kLocality);
#pragma GCC unroll 4
            for (int part = 0; part < 64; part += W * 4) sums[s] += load<vi>(p + part);
        }
    vi total{};
    for (const vi& sum : sums) total += sum;
    asm volatile("" : : "m"(total));
    return int64_t(stream * kStreams);
}

// What a decode step can hope for; which way is the best differs from one processor to the next.
int64_t read_burst(const uint8_t* data, size_t bytes, int way) {
    switch (way) {
        case 0: return read_streams<8, 1024, 3>(data, bytes);
        case 1: return read_streams<8, 2048, 2>(data, bytes);
        case 2: return read_streams<4, 1024, 3>(data, bytes);
        default: return read_streams<4, 2048, 2>(data, bytes);
    }
}

}  // namespace

#define PRONK_STRING_OF(x) #x
#define PRONK_STRING(x) PRONK_STRING_OF(x)

extern const Kernels table;
constinit const Kernels table = {
    PRONK_STRING(PRONK_ISA), linear_group, quantize_row, rms_norm_row, swiglu_row, load_query, attend,
    merge, store_key, store_value, int8_burst, read_burst,
};

}  // namespace pronk::PRONK_ISA
