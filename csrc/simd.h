// The few vector operations that kernels need, for the instruction set this file is compiled for.
//
// Kernel sources are compiled once for each ISA, into a namespace of its own (PRONK_ISA). Vectors
// are the compiler's own (GCC and clang): + - * / and casts are written as such. What differs is
// the width W and a handful of conversions. Everything here has internal linkage, so that code for
// a newer ISA can never be linked into the older one.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"

#if defined(PRONK_VNNI_512) || defined(PRONK_VNNI_256) || defined(PRONK_MADDUBS)
#define PRONK_X86
#include <immintrin.h>
#elif defined(PRONK_DOTPROD)
#include <arm_neon.h>
#endif

// CMakeLists.txt defines at most one of
//   PRONK_VNNI_512   dot products of bytes in 512 bits
//   PRONK_VNNI_256   in 256 bits, which AVX-VNNI adds to AVX2; AVX-512 has the same instruction under
//                    another code, by which the kernels can be tested where there is no AVX-VNNI
//   PRONK_MADDUBS    AVX2 alone: sums of two products in 16 bits
//   PRONK_DOTPROD    ARM's

namespace pronk::PRONK_ISA {
namespace {

#define PRONK_INLINE inline __attribute__((always_inline))

#if defined(PRONK_VNNI_512)
constexpr int W = 16;
#elif defined(PRONK_X86)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint8_t vb __attribute__((vector_size(W * 4)));
typedef int8_t vc __attribute__((vector_size(W)));  // one byte a lane
typedef uint8_t vu __attribute__((vector_size(W)));
typedef uint16_t vs __attribute__((vector_size(W * 4)));

PRONK_INLINE vf splat(float x) { return x - vf{}; }
PRONK_INLINE vi splat(int32_t x) { return x - vi{}; }
PRONK_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

template <class V, class T>
PRONK_INLINE V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class T>
PRONK_INLINE void store(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}
PRONK_INLINE vf load_f32(const float* p) { return load<vf>(p); }

#if defined(PRONK_VNNI_512)

PRONK_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
PRONK_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
PRONK_INLINE vf load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PRONK_INLINE void store_f16(uint16_t* p, vf v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
PRONK_INLINE vf load_bf16(const uint16_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
PRONK_INLINE vf load_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
PRONK_INLINE vf load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// acc + sum over i of u[4l+i] * s[4l+i], s being signed; exact
PRONK_INLINE vi dot4(vi acc, vb u, vb s) {
    return reinterpret_cast<vi>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(u), reinterpret_cast<__m512i>(s)));
}

#elif defined(PRONK_X86)

PRONK_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
PRONK_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
PRONK_INLINE vf load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PRONK_INLINE void store_f16(uint16_t* p, vf v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
PRONK_INLINE vf load_bf16(const uint16_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
PRONK_INLINE vf load_i8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
PRONK_INLINE vf load_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// Sums of adjacent products in 16 bits; they saturate, so codes and the number of sums added up must
// be small. Then the sums of adjacent sums, in 32 bits.
PRONK_INLINE vs multiply_pairs(vb codes, int32_t a) {
    return reinterpret_cast<vs>(_mm256_maddubs_epi16(reinterpret_cast<__m256i>(codes), _mm256_set1_epi32(a)));
}
PRONK_INLINE vi add_pairs(vs pairs) {
    return reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(pairs), _mm256_set1_epi16(1)));
}
PRONK_INLINE vi dot4(vi acc, vb unsigned_bytes, vb signed_bytes) {
    const __m256i u = reinterpret_cast<__m256i>(unsigned_bytes), s = reinterpret_cast<__m256i>(signed_bytes);
#if defined(PRONK_VNNI_256) && !defined(PRONK_AVXVNNI_BY_AVX512)
    return reinterpret_cast<vi>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(acc), u, s));
#elif defined(PRONK_VNNI_256)
    return reinterpret_cast<vi>(_mm256_dpbusd_epi32(reinterpret_cast<__m256i>(acc), u, s));
#else  // widened to 16 bits: pair sums of 8-bit codes would saturate
    const __m256i low = _mm256_set1_epi16(0x00ff);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, low), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return acc + reinterpret_cast<vi>(even) + reinterpret_cast<vi>(odd);
#endif
}

#elif defined(PRONK_DOTPROD)

PRONK_INLINE vf fma(vf a, vf b, vf c) {
    return reinterpret_cast<vf>(vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a), reinterpret_cast<float32x4_t>(b)));
}
PRONK_INLINE vf max(vf a, vf b) { return reinterpret_cast<vf>(a > b ? reinterpret_cast<vi>(a) : reinterpret_cast<vi>(b)); }
PRONK_INLINE vf load_f16(const uint16_t* p) {
    return reinterpret_cast<vf>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))));
}
PRONK_INLINE void store_f16(uint16_t* p, vf v) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(reinterpret_cast<float32x4_t>(v))));
}
PRONK_INLINE vf load_bf16(const uint16_t* p) { return reinterpret_cast<vf>(vshll_n_u16(vld1_u16(p), 16)); }
PRONK_INLINE vf load_i8(const int8_t* p) { return __builtin_convertvector(load<vc>(p), vf); }
PRONK_INLINE vf load_u8(const uint8_t* p) { return __builtin_convertvector(load<vu>(p), vf); }
PRONK_INLINE vi dot4_signed(vi acc, vb a, vb b) {
    return reinterpret_cast<vi>(vdotq_s32(reinterpret_cast<int32x4_t>(acc), reinterpret_cast<int8x16_t>(a), reinterpret_cast<int8x16_t>(b)));
}
// The instruction multiplies signed bytes: codes go 128 lower, and 128 times the other side comes on top.
PRONK_INLINE vi dot4(vi acc, vb u, vb s) {
    return dot4_signed(acc, u ^ 0x80, s) + (dot4_signed(vi{}, vb{} + uint8_t(1), s) << 7);
}

#else

PRONK_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
PRONK_INLINE vf max(vf a, vf b) { return reinterpret_cast<vf>(a > b ? reinterpret_cast<vi>(a) : reinterpret_cast<vi>(b)); }
PRONK_INLINE vf load_f16(const uint16_t* p) {
    return vf{f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
}
PRONK_INLINE void store_f16(uint16_t* p, vf v) {
    for (int i = 0; i < W; ++i) p[i] = f32_to_f16(v[i]);
}
PRONK_INLINE vf load_bf16(const uint16_t* p) {
    return vf{bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])};
}
PRONK_INLINE vf load_i8(const int8_t* p) { return vf{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
PRONK_INLINE vf load_u8(const uint8_t* p) { return vf{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
PRONK_INLINE vi dot4(vi acc, vb u, vb s) {
    for (int lane = 0; lane < W; ++lane)
        for (int i = 0; i < 4; ++i) acc[lane] += int32_t(u[4 * lane + i]) * int8_t(s[4 * lane + i]);
    return acc;
}

#endif

// With the same four signed bytes in every lane.
PRONK_INLINE vi dot4(vi acc, vb codes, int32_t four) { return dot4(acc, codes, reinterpret_cast<vb>(splat(four))); }

// The same for codes up to 127.
PRONK_INLINE vi dot4_small(vi acc, vb codes, int32_t four) {
#if defined(PRONK_DOTPROD)
    return dot4_signed(acc, codes, reinterpret_cast<vb>(splat(four)));
#else
    return dot4(acc, codes, four);
#endif
}

PRONK_INLINE vb shift_right(vb v, int n) { return reinterpret_cast<vb>(reinterpret_cast<vs>(v) >> n); }
PRONK_INLINE vb shift_left(vb v, int n) { return reinterpret_cast<vb>(reinterpret_cast<vs>(v) << n); }

// How floats up to `peak` become integers of `levels` steps each side of zero.
struct Rounding {
    float inverse, scale;
    bool zero;  // all integers are 0: the floats are, or their scale is not a number
};

// A peak that is NaN or infinite makes the scale NaN, so that it reaches every sum; what is smaller
// than any activation counts as zero, because its inverse would overflow.
PRONK_INLINE Rounding rounding_of(float peak, float levels) {
    if (!(peak <= 3.4028235e38f)) return {0.0f, __builtin_nanf(""), true};
    if (peak < 1e-30f) return {0.0f, 0.0f, true};
    return {levels / peak, peak / levels, false};
}

// W floats as integers, rounded to nearest even.
PRONK_INLINE vi round_to_int(const float* x, const Rounding& rounding) {
    if (rounding.zero) return vi{};
    return reinterpret_cast<vi>(load_f32(x) * rounding.inverse + splat(12582912.0f)) - 0x4b400000;
}

// exp(x), 0 below -87.3 and exp(88) above 88; about 1 unit in the last place (Cody-Waite reduction and the
// degree-6 minimax polynomial of Cephes' expf). NaN stays NaN.
PRONK_INLINE vf exp(vf x) {
    const vi in_range = x > -87.3f;
    x = x > 88.0f ? splat(88.0f) : x;
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf shifted = fma(x, splat(1.44269504f), magic);
    const vf n = shifted - magic;
    vf r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    // n sits in the low mantissa bits of `shifted`; 127 more of it is an exponent
    const vi exponent = (reinterpret_cast<vi>(shifted) + (127 - 0x4b400000)) << 23;
    const vf y = p * reinterpret_cast<vf>(exponent);
    const vi is_nan = x != x;
    return reinterpret_cast<vf>((reinterpret_cast<vi>(y) & in_range) | (reinterpret_cast<vi>(x) & is_nan));
}

// Sum of the lanes, halves first: one fixed order for each width.
PRONK_INLINE float sum_lanes(vf v) {
#if defined(PRONK_VNNI_512)
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#elif defined(PRONK_X86)
    const __m256 a = v;
#endif
#if defined(PRONK_X86)
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// Largest lane of an integer vector.
PRONK_INLINE int32_t max_lanes(vi v) {
#if defined(PRONK_VNNI_512)
    const __m512i x = reinterpret_cast<__m512i>(v);
    const __m256i a = _mm256_max_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
#elif defined(PRONK_X86)
    const __m256i a = reinterpret_cast<__m256i>(v);
#endif
#if defined(PRONK_X86)
    const __m128i b = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i c = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
#else
    const int32_t a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
#endif
}

// Sum of 16 signed bytes.
PRONK_INLINE int32_t sum_bytes(const int8_t* p) {
#if defined(PRONK_X86)
    const __m128i shifted = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(-128));
    const __m128i sums = _mm_sad_epu8(shifted, _mm_setzero_si128());  // of each 8, as unsigned bytes
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
#else
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += p[i];
    return sum;
#endif
}

// Largest magnitude of the n floats at x (n a multiple of W); NaN if one of them is NaN.
PRONK_INLINE float peak_of(const float* x, int64_t n) {
    vi largest{};
    for (int64_t i = 0; i < n; i += W) {
        const vi bits = load<vi>(x + i) & 0x7fffffff;  // ordered as the magnitudes are, NaN last
        largest = bits > largest ? bits : largest;
    }
    return bits_to_float(uint32_t(max_lanes(largest)));
}

// Largest lane; which one counts if some are not numbers is left open.
PRONK_INLINE float max_lanes(vf v) {
#if defined(PRONK_VNNI_512)
    const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#elif defined(PRONK_X86)
    const __m256 a = v;
#endif
#if defined(PRONK_X86)
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
#else
    const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
#endif
}

}  // namespace
}  // namespace pronk::PRONK_ISA
