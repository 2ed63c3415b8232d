// float16 and bfloat16 conversions without any instruction set; exact, round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace pronk {

static inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline float f16_to_f32(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16;
    const uint32_t magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // the exponent is off by 112; a multiplication sets it right for subnormals too
    return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

static inline uint16_t f32_to_f16(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
    if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the code in the low bits, rounded
        const uint32_t code = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
        return uint16_t(sign | code);
    }
    const uint32_t odd = magnitude >> 13 & 1;
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
}

static inline float bf16_to_f32(uint16_t b) { return bits_to_float(uint32_t(b) << 16); }

}  // namespace pronk
