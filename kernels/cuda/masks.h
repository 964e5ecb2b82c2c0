// Which scores of a tile count, and sums of exponentials that never overflow: one element at a time.
#pragma once
#include <cfloat>
#include <cmath>

#include "numbers.h"
#include "tiles.h"

namespace tdro_tiles {

// logsumexp = largest + log(sum). The largest of nothing is the lowest float, not -inf: differences stay numbers.
struct LogSum {
  float largest, sum;
};

TDRO_DEVICE LogSum no_scores() { return {-FLT_MAX, 0.0f}; }

// A NaN makes the sum NaN, for good. -inf adds nothing.
TDRO_DEVICE void add(LogSum& total, float score) {
  const float difference = score == total.largest ? 0.0f : score - total.largest;
  const float ratio = expf(-fabsf(difference));
  if (difference > 0) {
    total.sum = total.sum * ratio + 1.0f;
    total.largest = score;
  } else {
    total.sum += ratio;
  }
}

TDRO_DEVICE void merge(LogSum& total, LogSum other) {
  const float difference = other.largest == total.largest ? 0.0f : other.largest - total.largest;
  const float ratio = expf(-fabsf(difference));
  if (difference > 0) {
    total.sum = total.sum * ratio + other.sum;
    total.largest = other.largest;
  } else {
    total.sum += other.sum * ratio;
  }
}

TDRO_DEVICE float logsumexp(LogSum total) { return total.largest + logf(total.sum); }

TDRO_DEVICE float softplus(float x) { return x > 0 ? x + log1pf(expf(-x)) : log1pf(expf(x)); }

struct RowMask {
  int64_t group, positive_id;
  const int64_t* known;
  float limit;
  int positive;  // column of its group in the tile, or -1
};

struct ColumnMask {
  int64_t group, id;
  float log_weight;
};

// Whether columns bring something of their own; if not, only positives and limits are looked at.
inline bool has_tables(const TdroTile& tile) {
  return tile.query_group || tile.positive_ids || tile.known_ids || tile.log_weights;
}

template <bool kTables>
TDRO_DEVICE RowMask row_mask(const TdroTile& tile, int64_t group, int64_t row) {
  const int64_t positive = tile.positives[row] - tile.first_column - group * tile.columns;
  RowMask mask;
  mask.positive = positive >= 0 && positive < tile.columns ? int(positive) : -1;
  mask.limit = tile.limits ? tile.limits[row] : INFINITY;
  mask.group = kTables && tile.query_group ? tile.query_group[row] : 0;
  mask.positive_id = kTables && tile.positive_ids ? tile.positive_ids[row] : 0;
  mask.known = kTables && tile.known_ids ? tile.known_ids + row * tile.num_known : nullptr;
  return mask;
}

template <bool kTables>
TDRO_DEVICE ColumnMask column_mask(const TdroTile& tile, int64_t column) {
  ColumnMask mask;
  mask.group = kTables && tile.document_group ? tile.document_group[column] : 0;
  mask.id = kTables && tile.column_ids ? tile.column_ids[column] : 0;
  mask.log_weight = kTables && tile.log_weights ? tile.log_weights[column] : 0.0f;
  return mask;
}

template <bool kTables>
TDRO_DEVICE bool counts(const TdroTile& tile, const RowMask& row, const ColumnMask& column, int j, float product) {
  bool kept = j < tile.columns && j != row.positive && !(product > row.limit);
  if (kTables) {
    kept = kept && row.group == column.group && !(tile.positive_ids && column.id == row.positive_id);
    for (int64_t k = 0; row.known && k < tile.num_known; ++k)
      kept = kept && !(row.known[k] == column.id && column.id != -1);
  }
  return kept;
}

// The score of a negative - `less`, rounded once; -inf where it does not count.
template <bool kTables>
TDRO_DEVICE float score_of(const TdroTile& tile, const RowMask& row, const ColumnMask& column, int j, float product,
                           float per_temperature, float less) {
  const float score = fmaf(product, per_temperature, (kTables ? column.log_weight : 0.0f) - less);
  return counts<kTables>(tile, row, column, j, product) ? score : -INFINITY;
}

}  // namespace tdro_tiles
