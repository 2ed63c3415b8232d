// From the blocks of a file to the packed layouts of layout.h, and to floats.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "layout.h"

namespace pronk {

struct KindInfo {
    int elements;  // weights of a block
    int bytes;
    Pack pack;
};

// Throws std::invalid_argument for a number that is no Kind.
KindInfo kind_info(int kind);

// One row of k weights to floats; the arithmetic is that of the format's definition.
void dequantize_row(Kind kind, const uint8_t* row, int64_t k, float* out);

// Rows of a tensor (`row_bytes` apart) to panels; `out` holds (rows + 15) / 16 zeroed panels.
void pack_rows(Kind kind, const uint8_t* data, int64_t row_bytes, int64_t rows, int64_t k, uint8_t* out);

}  // namespace pronk
