// From the blocks of a file to the packed layouts of layout.h, and to floats.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "layout.h"

namespace pronk {

// Of the packed bytes: raise it whenever a pack_rows of the same rows would give others, since packed
// weights are also kept on disk (checkpoints/layouts.py).
constexpr int kLayoutVersion = 1;

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

// A number that tells damaged bytes from whole ones, as fast as memory is read; not a secure hash.
uint64_t checksum(const uint8_t* data, size_t bytes);

}  // namespace pronk
