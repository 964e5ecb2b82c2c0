// Embeddings in, the blocked operands of tile.h out; converts float16, and bfloat16 where the products are float32.
#pragma once

#include <cstdint>

#include "infonce.h"

namespace tdro {

// `count` rows of a [*, width] matrix: first, first + 1, ... or those that `index` names.
struct Rows {
  const void* data;
  Type type;
  int64_t width, first, count;
  const int64_t* index;  // [count] or null

  int64_t row(int64_t i) const { return index ? index[i] : first + i; }
};

// Four layouts of the same rows; widths and counts that do not fill a block are filled up with zeros.
void pack_transposed(const Rows& rows, float* out);  // [row block][dimension][32 rows]
// [dimension block][of `all` rows, these][32 dimensions]
void pack_lanes(const Rows& rows, int64_t all, float* out);
void pack_transposed_pairs(const Rows& rows, uint32_t* out);  // [row block][dimension pair][32 rows]
// [dimension block][padded rows][16 dimension pairs]
void pack_lane_pairs(const Rows& rows, int64_t padded, uint32_t* out);
// [dimension block][of `all` pairs of rows, these][32 dimensions]
void pack_row_pairs(const Rows& rows, int64_t all, uint32_t* out);

// One row as float32 [width]: where it is, else converted into `room` [width].
const float* wide_row(const Rows& rows, int64_t i, float* room);

}  // namespace tdro
