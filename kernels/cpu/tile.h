// One tile of scores: the work that is compiled once for every instruction set.
//
// Every operand is cut into blocks of 32 lanes, so that all strides are constants:
//   lanes of rows      [row block][...][32]     lanes of dimensions  [dimension block][...][32]
// A score tile is [row block][column][32 rows]. The three products of the loss then read what the last step wrote:
//   scores  S[column][rows]       = sum over dimensions  D[column][dimension] * Q^T[dimension][rows]
//   dQ[row][dimensions]          += sum over columns     P[column][row] * D[column][dimensions]
//   dD[column][dimensions]       += sum over rows        P[column][row] * Q[row][dimensions]
// In bfloat16 two neighbours along the summed axis share one 32-bit lane.
#pragma once

#include <cstdint>

#include "infonce.h"

namespace tdro {

constexpr int LANES = 32;

inline int64_t blocks_of(int64_t size) { return (size + LANES - 1) / LANES; }

// Which pairs of a tile are negatives. Ids are ranks in the sorted document ids, -2 = an id that no document has.
struct TileMask {
  const int32_t* column_ids;    // [columns] or null
  const int32_t* positive_ids;  // [row blocks * 32] or null
  const int32_t* known_ids;     // [known][known_lanes], of which the first row blocks * 32 count, or null
  int known;
  int64_t known_lanes;
  const float* limits;          // [row blocks * 32] or null: scaled scores above are no negatives
  const float* log_weights;     // [columns] or null
};

// A and B packed as above, C [m][32 of c_row] float32. k counts the summed axis (in pairs for bfloat16).
struct Product {
  int64_t m, k;
  const void* a;
  int64_t a_block;  // distance of two blocks of A along the summed axis, in lanes
  const void* b;    // [k][32]
  float* c;
  int64_t c_row;    // distance of two rows of C, in floats
  bool add;         // to what C holds
};

struct TileKernels {
  const char* name;
  bool pairs;  // operands are pairs of bfloat16 in 32-bit lanes
  // C = A B with A[m][k]: blocks of 32 floats (16 pairs) along k.
  void (*product_rows)(const Product& product);
  // C = A B with A[k][32], of which the first m <= 32 lanes are the rows of C.
  void (*product_lanes)(const Product& product);
  // Scale raw products to scores, take out what is no negative (-inf), give the highest score of each row.
  void (*finish_scores)(float* scores, int64_t row_blocks, int64_t columns, float scale, const TileMask& mask,
                        float* highest);
  // scores -> exp(score - highest), sums[row] = their sum. A row whose highest is -inf gives zeros.
  void (*exponentials)(float* scores, int64_t row_blocks, int64_t columns, const float* highest, float* sums);
  // Of each column: the highest score of its rows, and the sum of exp(score - highest).
  void (*column_statistics)(const float* scores, int64_t row_blocks, int64_t columns, float* highest, float* sums);
  // The statistics of a tile into those of the tiles before it: highest score and sum of exponentials of each row.
  void (*merge_statistics)(float* highest, float* sums, const float* tile_highest, const float* tile_sums,
                           int64_t lanes);
  // out[row] = factors * exp(highest - totals), 0 where highest is -inf.
  void (*row_scales)(const float* highest, const float* totals, const float* factors, float* out, int64_t lanes);
  // scores -> factors[row] * exp(score - totals[row]) (+ the same by columns where given).
  void (*shares)(float* scores, int64_t row_blocks, int64_t columns, const float* totals, const float* factors,
                 const float* column_totals, const float* column_factors);
  // values[row block][column][row] *= factors[row], into `out`.
  void (*scale_rows)(const float* values, float* out, int64_t row_blocks, int64_t columns, const float* factors);
  // rest[row] -= the sum of its values.
  void (*take_rows)(const float* values, int64_t row_blocks, int64_t columns, float* rest);
  // target[32 lanes] (+)= source, n lanes of it.
  void (*add_lanes)(float* target, const float* source, int64_t lanes, bool add);
  // target += factor * source.
  void (*add_scaled)(float* target, const float* source, float factor, int64_t width);
  float (*dot)(const float* a, const float* b, int64_t width);
  // c[column][32 of c_row] += factors[column] * row[32].
  void (*add_outer)(float* c, int64_t c_row, int64_t columns, const float* factors, const float* row);
  // Mean of bfloat16 rows, which lie as pairs of neighbours [(rows + 1) / 2][32]; the last one's neighbour may be 0.
  void (*pair_means)(const uint32_t* pairs, int64_t rows, float* mean);
  // Floats -> bfloat16. [row block][column][32 rows] -> pairs of neighbouring rows [row block][column][16];
  // lost[column] = what the rounding takes from the sum of a column.
  void (*lane_pairs)(const float* in, uint32_t* out, int64_t row_blocks, int64_t columns, float* lost);
  // [count][32] -> pairs of neighbours in count [count/2][32]; lost[lane] += what the rounding takes from a lane's sum.
  void (*row_pairs)(const float* in, uint32_t* out, int64_t count, float* lost);
};

const TileKernels* kernels_generic();
#ifdef TDRO_X86
// null where the processor does not have the instructions.
const TileKernels* kernels_avx2();
const TileKernels* kernels_avx512();
const TileKernels* kernels_avx512bf16();
#else
inline const TileKernels* kernels_avx2() { return nullptr; }
inline const TileKernels* kernels_avx512() { return nullptr; }
inline const TileKernels* kernels_avx512bf16() { return nullptr; }
#endif

}  // namespace tdro
