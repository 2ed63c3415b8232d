#include "pack.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

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

// Codes c[32] of row r (zero point added) into a block's body.
void put_codes(Pack pack, const uint8_t* c, int r, uint8_t* body) {
    const int bytes = pack_info(pack).code_bytes;
    if (bytes == 512) {
        for (int g = 0; g < kGroups; ++g) std::memcpy(body + g * 64 + r * 4, c + 4 * g, 4);
        return;
    }
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 4; ++i)
            body[j * 64 + r * 4 + i] = uint8_t((c[4 * j + i] & 15) | c[4 * (j + 4) + i] << 4);
    if (pack == Pack::Q5K)
        for (int i = 0; i < 4; ++i) {
            uint8_t bits = 0;
            for (int g = 0; g < kGroups; ++g) bits |= (c[4 * g + i] >> 4 & 1) << g;
            body[256 + r * 4 + i] = bits;
        }
    if (pack == Pack::Q6K)
        for (int line = 0; line < 2; ++line)
            for (int i = 0; i < 4; ++i) {
                uint8_t bits = 0;
                for (int g = line; g < kGroups; g += 2) bits |= (c[4 * g + i] >> 4 & 3) << 2 * (g / 2);
                body[256 + line * 64 + r * 4 + i] = bits;
            }
}

uint8_t* super_of(Pack pack, uint8_t* panel, int64_t b) {
    return panel + block_offset(pack, b / 8 * 8) - pack_info(pack).super_bytes;
}

// Row r of a panel from blocks of 32 inputs whose scale is a half: Q4_0, Q4_1, Q8_0.
void pack_legacy_row(Kind kind, Pack pack, const uint8_t* row, int64_t k, int r, uint8_t* panel) {
    const KindInfo info = kind_info(int(kind));
    for (int64_t b = 0; b < k / kBlock; ++b, row += info.bytes) {
        uint8_t* head = panel + block_offset(pack, b);
        uint8_t* body = head + pack_info(pack).head_bytes;
        write(head + 2 * r, read<uint16_t>(row));
        if (kind == Kind::Q8_0) {
            for (int g = 0; g < kGroups; ++g)
                write(body + g * 64 + r * 4, read<uint32_t>(row + 2 + 4 * g) ^ 0x80808080u);
            continue;
        }
        if (kind == Kind::Q4_1) write(head + 32 + 2 * r, read<uint16_t>(row + 2));
        // the file's nibble order within a row is that of the panel's lines
        const uint8_t* qs = row + (kind == Kind::Q4_1 ? 4 : 2);
        for (int j = 0; j < 4; ++j) write(body + j * 64 + r * 4, read<uint32_t>(qs + 4 * j));
    }
}

// Row r of a panel from K-quant super-blocks that keep their own scales: Q4_K, Q5_K, Q6_K.
void pack_k_row(Kind kind, Pack pack, const uint8_t* row, int64_t k, int r, uint8_t* panel) {
    const KindInfo info = kind_info(int(kind));
    for (int64_t s = 0; s < k / kSuper; ++s, row += info.bytes) {
        Unpacked u;
        unpack(kind, row, u);
        uint8_t* super = super_of(pack, panel, 8 * s);
        uint8_t sc[16], m[8];
        if (kind == Kind::Q6_K) {
            write(super + 2 * r, read<uint16_t>(row + 208));
            std::memcpy(sc, row + 192, 16);
        } else {
            write(super + 2 * r, read<uint16_t>(row));
            write(super + 32 + 2 * r, read<uint16_t>(row + 2));
            unpack_k_scales(row + 4, sc, m);
        }
        for (int b = 0; b < 8; ++b) {
            uint8_t* head = panel + block_offset(pack, 8 * s + b);
            uint8_t codes[kBlock];
            for (int i = 0; i < kBlock; ++i) codes[i] = uint8_t(u.q[kBlock * b + i] + pack_info(pack).zero);
            put_codes(pack, codes, r, head + pack_info(pack).head_bytes);
            head[r] = kind == Kind::Q6_K ? sc[2 * b] : sc[b];
            head[16 + r] = kind == Kind::Q6_K ? sc[2 * b + 1] : m[b];
        }
    }
}

// Row r of a panel from any other kind: bytes with float scales, nothing lost.
void pack_bytes_row(Kind kind, Pack pack, const uint8_t* row, int64_t k, int r, uint8_t* panel) {
    const KindInfo info = kind_info(int(kind));
    const PackInfo layout = pack_info(pack);
    for (int64_t first = 0; first < k; first += info.elements, row += info.bytes) {
        Unpacked u;
        unpack(kind, row, u);
        for (int i = 0; i < info.elements; i += kBlock) {
            uint8_t* head = panel + block_offset(pack, (first + i) / kBlock);
            uint8_t codes[kBlock];
            for (int j = 0; j < kBlock; ++j) codes[j] = uint8_t(u.q[i + j]) ^ 0x80;
            put_codes(pack, codes, r, head + layout.head_bytes);
            for (int sub = 0; sub < layout.scales; ++sub) {
                write(head + (sub * kPanel + r) * 4, u.scale[i / 16 + sub]);
                if (layout.mins) write(head + ((layout.scales + sub) * kPanel + r) * 4, u.min[i / 16 + sub]);
            }
        }
    }
}

void pack_dense_row(Pack pack, const uint8_t* row, int64_t k, int r, uint8_t* panel) {
    const int width = pack_info(pack).code_bytes;
    for (int64_t i = 0; i < k; ++i) std::memcpy(panel + (i * kPanel + r) * width, row + i * width, width);
}

void pack_row(Kind kind, const uint8_t* row, int64_t k, int r, uint8_t* panel) {
    const Pack pack = kind_info(int(kind)).pack;
    switch (pack) {
        case Pack::F32: case Pack::F16: case Pack::BF16: return pack_dense_row(pack, row, k, r, panel);
        case Pack::Q4: case Pack::Q4M: case Pack::Q8: return pack_legacy_row(kind, pack, row, k, r, panel);
        case Pack::Q4K: case Pack::Q5K: case Pack::Q6K: return pack_k_row(kind, pack, row, k, r, panel);
        case Pack::I8: case Pack::I8M: case Pack::I8S: case Pack::I8SM:
            return pack_bytes_row(kind, pack, row, k, r, panel);
    }
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
    const size_t stride = panel_bytes(kind_info(int(kind)).pack, k);
    parallel_for((rows + kPanel - 1) / kPanel, [&](int64_t p) {
        for (int r = 0; r < kPanel && p * kPanel + r < rows; ++r)
            pack_row(kind, data + (p * kPanel + r) * row_bytes, k, r, out + p * stride);
    });
}

}  // namespace pronk
