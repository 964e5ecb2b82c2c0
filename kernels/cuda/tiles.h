// The CUDA kernels of the loss: plain C, no torch. All of them work on one tile of scores at a time.
#pragma once
#include <stdint.h>

// How embeddings and shares are stored.
enum TdroStorage { TDRO_FLOAT32 = 0, TDRO_BFLOAT16 = 1, TDRO_FLOAT16 = 2 };

// A tile of products q . d and which of them count as negatives.
//
// The tile is one matrix, or several of one shape that lie one after the other, such as rows that have columns of their
// own. Every pointer is to memory of the device. What belongs to rows is [groups * rows], what belongs to columns is
// [groups * columns], both from the first row and column of the tile on; a null pointer leaves its mask out.
struct TdroTile {
  float* scores;  // [groups, rows, stride], aligned to 16 bytes
  int64_t groups, rows, columns;
  int64_t stride;        // >= columns, a multiple of 4
  int64_t first_column;  // number of the tile's first column, as positives count columns
  const float* temperature;
  const int64_t* positives;       // column of the row's positive, never a negative; may be outside of the tile
  const int64_t* query_group;     // of rows: columns of other groups do not count
  const int64_t* document_group;  // of columns
  const int64_t* column_ids;
  const int64_t* positive_ids;  // of rows: columns with this id do not count
  const int64_t* known_ids;     // of rows, [groups * rows, num_known]: nor with these; -1 = none
  int64_t num_known;
  const float* limits;       // of rows: products above do not count
  const float* log_weights;  // of columns: added to the score
};

// Queries and documents with the positives of the rows.
struct TdroPositives {
  const void* queries;    // [rows, width]
  const void* documents;  // [columns, width]
  int64_t rows, columns, width;
  int storage;               // a TdroStorage
  const int64_t* positives;  // [rows]
};

// All functions put work on `stream` and return 0, or the number of a CUDA error. A logsumexp is kept as its largest
// score and the sum of exp(score - largest), so it is largest + log(sum); of nothing it is (lowest float, 0).
#ifdef __cplusplus
extern "C" {
#endif
const char* tdro_cuda_error(int error);

// Merge the rows of the tile into row_max, row_sum [groups * rows].
int tdro_tile_row_statistics(const struct TdroTile* tile, float* row_max, float* row_sum, void* stream);

// Merge the columns of the tile into column_max, column_sum [groups * columns].
// scratch   tdro_tile_column_scratch(tile) floats, aligned to 8 bytes
int tdro_tile_column_statistics(const struct TdroTile* tile, float* scratch, float* column_max, float* column_sum,
                                void* stream);
int64_t tdro_tile_column_scratch(const struct TdroTile* tile);

// Put row_factor exp(score - row_total) + column_factor exp(score - column_total) into the place of each score, 0 where
// it does not count. column_totals and column_factors are both null, or of the columns of the tile.
// A row of shares begins where its row of scores began, so in half precision its stride is twice that of the scores.
// residuals   null, or [groups * rows]: what rounding has taken off the shares of each row is added
int tdro_tile_gradient(const struct TdroTile* tile, const float* row_totals, const float* row_factors,
                       const float* column_totals, const float* column_factors, float* residuals, int storage,
                       void* stream);

// For a tile that holds all columns of its rows: losses [groups * rows], and row_weight exp(score - total) into the
// place of each score as above, where total is the logsumexp of positive and negatives.
int tdro_tile_softmax(const struct TdroTile* tile, const float* positive_scores, const float* row_weights,
                      float* losses, float* residuals, int storage, void* stream);

// q . d_positive / temperature [rows]; NaN where the positive is no column.
int tdro_positive_scores(const struct TdroPositives* sides, const float* temperature, float* scores, void* stream);

// Add query_factors[i] d_positive(i) to query_gradient [rows, width], and to document_gradient [columns, width] the sum
// of document_factors[i] q_i over the rows i of each positive. Positives that are no columns add nothing.
// order   [rows]: the rows sorted by positive, rows of one positive in the order they are to be summed
int tdro_add_positives(const struct TdroPositives* sides, const float* query_factors, const float* document_factors,
                       const int64_t* order, float* query_gradient, float* document_gradient, void* stream);
#ifdef __cplusplus
}
#endif
