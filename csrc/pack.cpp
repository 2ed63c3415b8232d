#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "half.h"
#include "threads.h"

namespace pronk {
namespace {

template <class T>
T read(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

template <class T>
void write(uint8_t* p, T value) {
    std::memcpy(p, &value, sizeof value);
}

float half_at(const uint8_t* p) { return f16_to_f32(read<uint16_t>(p)); }

// A block of a quantized kind as integers: weight i = q[i] * scale[i/16] + min[i/16].
struct Unpacked {
    int8_t q[kSuper];
    float scale[kSuper / 16], min[kSuper / 16];
    bool has_min = false;
};

void set_scales(Unpacked& u, int elements, float scale, float min = 0) {
    for (int i = 0; i < (elements + 15) / 16; ++i) u.scale[i] = scale, u.min[i] = min;
}

// byte j holds element j in its low and element j+16 in its high half
void unpack_nibbles(const uint8_t* qs, int8_t* q) {
    for (int j = 0; j < 16; ++j) q[j] = qs[j] & 15, q[j + 16] = qs[j] >> 4;
}

constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kMxfp4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The eight 6-bit scales and minimums of Q4_K and Q5_K.
void unpack_k_scales(const uint8_t* s, uint8_t* sc, uint8_t* m) {
    for (int j = 0; j < 8; ++j) {
        sc[j] = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        m[j] = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
    }
}

void unpack_q4_k(const uint8_t* b, const uint8_t* qs, const uint8_t* qh, Unpacked& u) {
    const float d = half_at(b), dmin = half_at(b + 2);
    uint8_t sc[8], m[8];
    unpack_k_scales(b + 4, sc, m);
    u.has_min = true;
    for (int g = 0; g < 8; ++g)
        for (int l = 0; l < 32; ++l) {
            u.q[32 * g + l] = qs[32 * (g / 2) + l] >> 4 * (g % 2) & 15;
            if (qh) u.q[32 * g + l] |= (qh[l] >> g & 1) << 4;
            u.scale[2 * g + l / 16] = d * sc[g];
            u.min[2 * g + l / 16] = -(dmin * m[g]);
        }
}

void unpack_q6_k(const uint8_t* b, Unpacked& u) {
    const uint8_t *ql = b, *qh = b + 128, *sc = b + 192;
    const float d = half_at(b + 208);
    for (int i = 0; i < 256; ++i) {
        const int half = i / 128, run = i / 32 % 4, l = i % 32;
        const int low = ql[64 * half + 32 * (run % 2) + l] >> 4 * (run / 2) & 15;
        const int high = qh[32 * half + l] >> 2 * run & 3;
        u.q[i] = int8_t((low | high << 4) - 32);
        u.scale[i / 16] = d * int8_t(sc[i / 16]);
    }
}

void unpack_q2_k(const uint8_t* b, Unpacked& u) {
    const uint8_t *scales = b, *qs = b + 16;
    const float d = half_at(b + 80), dmin = half_at(b + 82);
    u.has_min = true;
    for (int i = 0; i < 256; ++i) {
        u.q[i] = qs[32 * (i / 128) + i % 32] >> 2 * (i / 32 % 4) & 3;
        u.scale[i / 16] = d * (scales[i / 16] & 15);
        u.min[i / 16] = -(dmin * (scales[i / 16] >> 4));
    }
}

void unpack_q3_k(const uint8_t* b, Unpacked& u) {
    const uint8_t *hmask = b, *qs = b + 32, *packed = b + 96;
    const float d = half_at(b + 108);
    for (int i = 0; i < 256; ++i) {
        const int run = i / 32, l = i % 32;
        const int low = qs[32 * (i / 128) + l] >> 2 * (run % 4) & 3;
        u.q[i] = int8_t(low - (hmask[l] >> run & 1 ? 0 : 4));
    }
    for (int j = 0; j < 16; ++j) {
        const int low = j < 8 ? packed[j] & 15 : packed[j - 8] >> 4;
        u.scale[j] = d * ((low | (packed[8 + j % 4] >> 2 * (j / 4) & 3) << 4) - 32);
    }
}

void unpack_iq4_xs(const uint8_t* b, Unpacked& u) {
    const float d = half_at(b);
    const uint16_t high = read<uint16_t>(b + 2);
    for (int g = 0; g < 8; ++g) {
        const int scale = (b[4 + g / 2] >> 4 * (g % 2) & 15) | (high >> 2 * g & 3) << 4;
        unpack_nibbles(b + 8 + 16 * g, u.q + 32 * g);
        for (int i = 0; i < 32; ++i) u.q[32 * g + i] = kIq4Values[u.q[32 * g + i]];
        u.scale[2 * g] = u.scale[2 * g + 1] = d * (scale - 32);
    }
}

// Five base-3 digits a byte, most significant first: a digit is the byte times 3^n, modulo 256,
// times 3, divided by 256.
int8_t ternary(uint8_t byte, int n) {
    constexpr uint8_t powers[5] = {1, 3, 9, 27, 81};
    return int8_t((uint8_t(byte * powers[n]) * 3 >> 8) - 1);
}

void unpack_tq1_0(const uint8_t* b, Unpacked& u) {
    int8_t* q = u.q;
    for (int n = 0; n < 5; ++n)
        for (int m = 0; m < 32; ++m) *q++ = ternary(b[m], n);
    for (int n = 0; n < 5; ++n)
        for (int m = 0; m < 16; ++m) *q++ = ternary(b[32 + m], n);
    for (int n = 0; n < 4; ++n)
        for (int m = 0; m < 4; ++m) *q++ = ternary(b[48 + m], n);
    set_scales(u, 256, half_at(b + 52));
}

void unpack_tq2_0(const uint8_t* b, Unpacked& u) {
    for (int i = 0; i < 256; ++i) u.q[i] = int8_t((b[32 * (i / 128) + i % 32] >> 2 * (i / 32 % 4) & 3) - 1);
    set_scales(u, 256, half_at(b + 64));
}

void unpack_five_bits(const uint8_t* qh, const uint8_t* qs, int zero, Unpacked& u) {
    const uint32_t bits = read<uint32_t>(qh);
    unpack_nibbles(qs, u.q);
    for (int i = 0; i < 32; ++i) u.q[i] = int8_t((u.q[i] | (bits >> i & 1) << 4) - zero);
}

void unpack(Kind kind, const uint8_t* b, Unpacked& u) {
    switch (kind) {
        case Kind::Q4_0:
            unpack_nibbles(b + 2, u.q);
            for (int i = 0; i < 32; ++i) u.q[i] -= 8;
            return set_scales(u, 32, half_at(b));
        case Kind::Q4_1:
            unpack_nibbles(b + 4, u.q);
            u.has_min = true;
            return set_scales(u, 32, half_at(b), half_at(b + 2));
        case Kind::Q5_0: unpack_five_bits(b + 2, b + 6, 16, u); return set_scales(u, 32, half_at(b));
        case Kind::Q5_1:
            unpack_five_bits(b + 4, b + 8, 0, u);
            u.has_min = true;
            return set_scales(u, 32, half_at(b), half_at(b + 2));
        case Kind::Q8_0: std::memcpy(u.q, b + 2, 32); return set_scales(u, 32, half_at(b));
        case Kind::Q2_K: return unpack_q2_k(b, u);
        case Kind::Q3_K: return unpack_q3_k(b, u);
        case Kind::Q4_K: return unpack_q4_k(b, b + 16, nullptr, u);
        case Kind::Q5_K: return unpack_q4_k(b, b + 48, b + 16, u);
        case Kind::Q6_K: return unpack_q6_k(b, u);
        case Kind::IQ4_NL:
            unpack_nibbles(b + 2, u.q);
            for (int i = 0; i < 32; ++i) u.q[i] = kIq4Values[u.q[i]];
            return set_scales(u, 32, half_at(b));
        case Kind::IQ4_XS: return unpack_iq4_xs(b, u);
        case Kind::MXFP4:
            unpack_nibbles(b + 1, u.q);
            for (int i = 0; i < 32; ++i) u.q[i] = kMxfp4Values[u.q[i]];
            return set_scales(u, 32, std::ldexp(1.0f, int(b[0]) - 128));
        case Kind::Q1_0:
            for (int i = 0; i < 128; ++i) u.q[i] = b[2 + i / 8] >> i % 8 & 1 ? 1 : -1;
            return set_scales(u, 128, half_at(b));
        case Kind::TQ1_0: return unpack_tq1_0(b, u);
        case Kind::TQ2_0: return unpack_tq2_0(b, u);
        case Kind::F32: case Kind::F16: case Kind::BF16: break;
    }
    throw std::logic_error("unpack: a dense kind has no blocks");
}

// ---- packing ------------------------------------------------------------------------------------
//
// The 16 rows of a panel are packed side by side, block after block, so that every cache line of the
// panel is written once and in order.

// Rows of a tensor that make a panel, `stride` bytes apart.
struct Rows {
    const uint8_t* first;
    int64_t stride;
    int real;  // the others are zeros

    const uint8_t* at(int r, int64_t offset = 0) const { return first + r * stride + offset; }
};

// A word of each row: a line of a panel, or what it is made from.
struct alignas(64) Line {
    uint32_t r[kPanel];
};

using Quad = uint32_t __attribute__((vector_size(16)));

// 4 words of each row, from byte `offset` on.
inline void gather_four(const Rows& rows, int64_t offset, Line* to) {
    for (int r = 0; r < kPanel; r += 4) {
        const Quad a = read<Quad>(rows.at(r, offset)), b = read<Quad>(rows.at(r + 1, offset));
        const Quad c = read<Quad>(rows.at(r + 2, offset)), d = read<Quad>(rows.at(r + 3, offset));
        for (int w = 0; w < 4; ++w) {
            const Quad line = {a[w], b[w], c[w], d[w]};
            std::memcpy(to[w].r + r, &line, sizeof line);
        }
    }
}

template <int N>
inline void gather(const Rows& rows, int64_t offset, Line* to) {
    static_assert(N % 4 == 0);
    for (int w = 0; w < N; w += 4) gather_four(rows, offset + 4 * w, to + w);
}

inline uint8_t* put(uint8_t* to, const Line& line) {
    std::memcpy(to, line.r, sizeof line.r);
    return to + sizeof line.r;
}

// The 16-bit number at byte `offset` of each row.
inline uint8_t* put_halves(uint8_t* to, const Rows& rows, int64_t offset) {
    uint16_t halves[kPanel];
    for (int r = 0; r < kPanel; ++r) halves[r] = read<uint16_t>(rows.at(r, offset));
    std::memcpy(to, halves, sizeof halves);
    return to + sizeof halves;
}

inline uint8_t* put_halves(uint8_t* to, const Line& words, int shift) {
    uint16_t halves[kPanel];
    for (int r = 0; r < kPanel; ++r) halves[r] = uint16_t(words.r[r] >> shift);
    std::memcpy(to, halves, sizeof halves);
    return to + sizeof halves;
}

// Byte i of 4 words of bytes, from each row.
inline uint8_t* put_bytes(uint8_t* to, const Line* words, int i) {
    uint8_t bytes[kPanel];
    for (int r = 0; r < kPanel; ++r) bytes[r] = uint8_t(words[i / 4].r[r] >> 8 * (i % 4));
    std::memcpy(to, bytes, sizeof bytes);
    return to + sizeof bytes;
}

void pack_q4_0(const Rows& rows, int64_t k, uint8_t* to) {
    for (int64_t b = 0; b < k / kBlock; ++b) {
        Line codes[4];
        gather<4>(rows, 18 * b + 2, codes);
        to = put_halves(to, rows, 18 * b);
        // the file's nibble order within a row is that of the panel's lines
        for (const Line& line : codes) to = put(to, line);
    }
}

void pack_q4_1(const Rows& rows, int64_t k, uint8_t* to) {
    for (int64_t b = 0; b < k / kBlock; ++b) {
        Line codes[4];
        gather<4>(rows, 20 * b + 4, codes);
        to = put_halves(to, rows, 20 * b);
        to = put_halves(to, rows, 20 * b + 2);
        for (const Line& line : codes) to = put(to, line);
    }
}

void pack_q8_0(const Rows& rows, int64_t k, uint8_t* to) {
    uint32_t zero[kPanel];  // the zero point of rows that there are
    for (int r = 0; r < kPanel; ++r) zero[r] = r < rows.real ? 0x80808080u : 0;
    for (int64_t b = 0; b < k / kBlock; ++b) {
        Line codes[kGroups];
        gather<kGroups>(rows, 34 * b + 2, codes);
        to = put_halves(to, rows, 34 * b);
        for (Line& line : codes) {
            for (int r = 0; r < kPanel; ++r) line.r[r] ^= zero[r];
            to = put(to, line);
        }
    }
}

// Codes of a block of a K-quant, 4 bits each: bytes 0..31 of `group` hold one block in their low
// and the next in their high halves.
inline uint8_t* put_nibbles(uint8_t* to, const Line* group, bool high) {
    for (int j = 0; j < 4; ++j) {
        Line line;
        for (int r = 0; r < kPanel; ++r) {
            const uint32_t a = group[j].r[r], b = group[j + 4].r[r];
            line.r[r] = high ? (a >> 4 & 0x0f0f0f0f) | (b & 0xf0f0f0f0) : (a & 0x0f0f0f0f) | (b & 0x0f0f0f0f) << 4;
        }
        to = put(to, line);
    }
    return to;
}

// Bits b, b+1, .. (as many as `mask` has in a byte) of a block's `n` words, one word's beside the
// next one's.
template <int N>
inline uint8_t* put_plane(uint8_t* to, const Line* words, int step, int b, uint32_t mask) {
    Line line;
    for (int r = 0; r < kPanel; ++r) {
        uint32_t bits = 0;
        for (int n = 0; n < N; ++n) bits |= (words[n * step].r[r] >> b & mask) << n * (8 / N);
        line.r[r] = bits;
    }
    return put(to, line);
}

// Scales and minimums of Q4_K and Q5_K, 8 of each and row, from the words that hold them in 6 bits.
void spread_k_scales(const Line* words, Line* scales, Line* mins) {
    for (int r = 0; r < kPanel; ++r) {
        const uint32_t a = words[0].r[r], b = words[1].r[r], c = words[2].r[r];
        scales[0].r[r] = a & 0x3f3f3f3f;
        scales[1].r[r] = (c & 0x0f0f0f0f) | (a >> 6 & 0x03030303) << 4;
        mins[0].r[r] = b & 0x3f3f3f3f;
        mins[1].r[r] = (c >> 4 & 0x0f0f0f0f) | (b >> 6 & 0x03030303) << 4;
    }
}

template <bool FiveBits>
void pack_q4_k(const Rows& rows, int64_t k, uint8_t* to) {
    constexpr int kBytes = FiveBits ? 176 : 144;
    for (int64_t s = 0; s < k / kSuper; ++s) {
        Line head[4], high[kGroups], codes[32], scales[2], mins[2];
        gather<4>(rows, kBytes * s, head);
        if (FiveBits) gather<kGroups>(rows, kBytes * s + 16, high);
        gather<32>(rows, kBytes * (s + 1) - 128, codes);
        spread_k_scales(head + 1, scales, mins);
        to = put_halves(to, head[0], 0);
        to = put_halves(to, head[0], 16);
        for (int b = 0; b < 8; ++b) {
            to = put_bytes(to, scales, b);
            to = put_bytes(to, mins, b);
            to = put_nibbles(to, codes + b / 2 * 8, b % 2);
            if (FiveBits) to = put_plane<8>(to, high, 1, b, 0x01010101);
        }
    }
}

void pack_q6_k(const Rows& rows, int64_t k, uint8_t* to) {
    for (int64_t s = 0; s < k / kSuper; ++s) {
        Line low[32], high[16], scales[4];
        gather<32>(rows, 210 * s, low);
        gather<16>(rows, 210 * s + 128, high);
        gather<4>(rows, 210 * s + 192, scales);
        to = put_halves(to, rows, 210 * s + 208);
        for (int b = 0; b < 8; ++b) {
            const int half = b / 4, run = b % 4;
            to = put_bytes(to, scales, 2 * b);
            to = put_bytes(to, scales, 2 * b + 1);
            to = put_nibbles(to, low + 16 * half + 8 * (run % 2), run / 2);
            for (int g = 0; g < 2; ++g) to = put_plane<4>(to, high + 8 * half + g, 2, 2 * run, 0x03030303);
        }
    }
}

// Any other quantized kind: bytes with float scales, nothing lost.
void pack_bytes(Kind kind, Pack pack, const Rows& rows, int64_t k, uint8_t* to) {
    const KindInfo info = kind_info(int(kind));
    const PackInfo layout = pack_info(pack);
    const int head_bytes = layout.head_bytes, block_bytes = head_bytes + layout.code_bytes;
    for (int64_t s = 0; s < k / info.elements; ++s, to += info.elements / kBlock * block_bytes)
        for (int r = 0; r < rows.real; ++r) {
            Unpacked u;
            unpack(kind, rows.at(r, s * info.bytes), u);
            for (int i = 0; i < info.elements; i += kBlock) {
                uint8_t* head = to + i / kBlock * block_bytes;
                for (int g = 0; g < kGroups; ++g)
                    write(head + head_bytes + g * 64 + r * 4, read<uint32_t>(reinterpret_cast<uint8_t*>(u.q) + i + 4 * g) ^ 0x80808080u);
                for (int sub = 0; sub < layout.scales; ++sub) {
                    write(head + (sub * kPanel + r) * 4, u.scale[i / 16 + sub]);
                    if (layout.mins) write(head + ((layout.scales + sub) * kPanel + r) * 4, u.min[i / 16 + sub]);
                }
            }
        }
}

void pack_f32(const Rows& rows, int64_t k, uint8_t* to) {
    int64_t i = 0;
    for (; i + 4 <= k; i += 4) {
        Line words[4];
        gather<4>(rows, 4 * i, words);
        for (const Line& line : words) to = put(to, line);
    }
    for (; i < k; ++i, to += 4 * kPanel)
        for (int r = 0; r < kPanel; ++r) write(to + 4 * r, read<uint32_t>(rows.at(r, 4 * i)));
}

void pack_half(const Rows& rows, int64_t k, uint8_t* to) {
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        Line words[4];
        gather<4>(rows, 2 * i, words);
        for (const Line& line : words) to = put_halves(put_halves(to, line, 0), line, 16);
    }
    for (; i < k; ++i) to = put_halves(to, rows, 2 * i);
}

void pack_panel(Kind kind, const Rows& rows, int64_t k, uint8_t* to) {
    const Pack pack = kind_info(int(kind)).pack;
    switch (pack) {
        case Pack::F32: return pack_f32(rows, k, to);
        case Pack::F16: case Pack::BF16: return pack_half(rows, k, to);
        case Pack::Q4: return pack_q4_0(rows, k, to);
        case Pack::Q4M: return pack_q4_1(rows, k, to);
        case Pack::Q8: return pack_q8_0(rows, k, to);
        case Pack::Q4K: return pack_q4_k<false>(rows, k, to);
        case Pack::Q5K: return pack_q4_k<true>(rows, k, to);
        case Pack::Q6K: return pack_q6_k(rows, k, to);
        case Pack::I8: case Pack::I8M: case Pack::I8S: case Pack::I8SM: return pack_bytes(kind, pack, rows, k, to);
    }
}

// ---- checksums ----------------------------------------------------------------------------------

uint64_t mix(uint64_t sum, uint64_t number) {
    sum = (sum ^ number) * 0x9e3779b97f4a7c15u;
    return sum ^ sum >> 32;
}

// In each of 16 lanes of words their sum, and the sum of the sums, which tells their order.
uint64_t chunk_sum(const uint8_t* data, size_t bytes) {
    Line sums{}, sums_of_sums{};
    const auto add = [&](const uint8_t* words) {
        const Line line = read<Line>(words);
        for (int i = 0; i < kPanel; ++i) sums_of_sums.r[i] += sums.r[i] += line.r[i];
    };
    const size_t whole = bytes / sizeof(Line) * sizeof(Line);
    for (size_t at = 0; at < whole; at += sizeof(Line)) add(data + at);
    uint8_t rest[sizeof(Line)] = {};
    std::memcpy(rest, data + whole, bytes - whole);
    add(rest);
    uint64_t sum = 0;
    for (int i = 0; i < kPanel; ++i) sum = mix(sum, uint64_t(sums.r[i]) << 32 | sums_of_sums.r[i]);
    return sum;
}

}  // namespace

KindInfo kind_info(int kind) {
    switch (Kind(kind)) {
        case Kind::F32: return {1, 4, Pack::F32};
        case Kind::F16: return {1, 2, Pack::F16};
        case Kind::BF16: return {1, 2, Pack::BF16};
        case Kind::Q4_0: return {32, 18, Pack::Q4};
        case Kind::Q4_1: return {32, 20, Pack::Q4M};
        case Kind::Q5_0: return {32, 22, Pack::I8};
        case Kind::Q5_1: return {32, 24, Pack::I8M};
        case Kind::Q8_0: return {32, 34, Pack::Q8};
        case Kind::Q2_K: return {256, 84, Pack::I8SM};
        case Kind::Q3_K: return {256, 110, Pack::I8S};
        case Kind::Q4_K: return {256, 144, Pack::Q4K};
        case Kind::Q5_K: return {256, 176, Pack::Q5K};
        case Kind::Q6_K: return {256, 210, Pack::Q6K};
        case Kind::IQ4_NL: return {32, 18, Pack::I8};
        case Kind::IQ4_XS: return {256, 136, Pack::I8};
        case Kind::MXFP4: return {32, 17, Pack::I8};
        case Kind::Q1_0: return {128, 18, Pack::I8};
        case Kind::TQ1_0: return {256, 54, Pack::I8};
        case Kind::TQ2_0: return {256, 66, Pack::I8};
    }
    throw std::invalid_argument("unknown tensor kind " + std::to_string(kind));
}

void dequantize_row(Kind kind, const uint8_t* row, int64_t k, float* out) {
    const KindInfo info = kind_info(int(kind));
    if (pack_info(info.pack).dense) {
        for (int64_t i = 0; i < k; ++i, row += info.bytes) {
            if (kind == Kind::F32) out[i] = read<float>(row);
            if (kind == Kind::F16) out[i] = half_at(row);
            if (kind == Kind::BF16) out[i] = bf16_to_f32(read<uint16_t>(row));
        }
        return;
    }
    for (int64_t first = 0; first < k; first += info.elements, row += info.bytes) {
        Unpacked u;
        unpack(kind, row, u);
        for (int i = 0; i < info.elements; ++i) {
            const float value = float(u.q[i]) * u.scale[i / 16];
            out[first + i] = u.has_min ? value + u.min[i / 16] : value;
        }
    }
}

void pack_rows(Kind kind, const uint8_t* data, int64_t row_bytes, int64_t rows, int64_t k, uint8_t* out) {
    const KindInfo info = kind_info(int(kind));
    const size_t stride = panel_bytes(info.pack, k), bytes = size_t(k / info.elements) * info.bytes;
    parallel_for((rows + kPanel - 1) / kPanel, [&](int64_t p) {
        Rows from{data + p * kPanel * row_bytes, row_bytes, int(std::min<int64_t>(kPanel, rows - p * kPanel))};
        std::vector<uint8_t> padded;
        if (from.real < kPanel) {
            padded.resize(kPanel * bytes);
            for (int r = 0; r < from.real; ++r) std::memcpy(padded.data() + r * bytes, from.at(r), bytes);
            from = {padded.data(), int64_t(bytes), from.real};
        }
        pack_panel(kind, from, k, out + p * stride);
    });
}

uint64_t checksum(const uint8_t* data, size_t bytes) {
    constexpr size_t kChunk = size_t(1) << 20;
    std::vector<uint64_t> sums((bytes + kChunk - 1) / kChunk);
    parallel_for(int64_t(sums.size()), [&](int64_t i) {
        sums[i] = chunk_sum(data + i * kChunk, std::min(kChunk, bytes - i * kChunk));
    });
    uint64_t sum = bytes;
    for (const uint64_t chunk : sums) sum = mix(sum, chunk);
    return sum;
}

}  // namespace pronk
