// What the blocks of the kernels do. A block is given as a type: threads of a GPU, or a loop over emulated ones.
//
// Block::each(f) calls f(thread) for all threads, Block::barrier() separates what they do, Block::shared is memory that
// they share, and PerThread<State>::of(thread) what a thread keeps across barriers.
#pragma once
#include "masks.h"

namespace tdro_tiles {

constexpr int kThreads = 256;
constexpr int kVector = 4;                 // neighbouring columns that a thread reads at once
constexpr int kStep = kThreads * kVector;  // columns that a block reads at once
constexpr int kColumnRows = 64;            // rows that a block sums when it sums columns

// Rows that one block works on: up to kRows of one group.
struct RowSpan {
  int64_t group, first;  // first row, counted over all groups
  int count;
};

template <int kRows>
TDRO_DEVICE RowSpan row_span(const TdroTile& tile, int64_t block) {
  const int64_t per_group = (tile.rows + kRows - 1) / kRows;
  const int64_t group = block / per_group, row = block % per_group * kRows;
  const int64_t left = tile.rows - row;
  return {group, group * tile.rows + row, left < kRows ? int(left) : kRows};
}

TDRO_DEVICE Four<float> read_scores(const TdroTile& tile, int64_t row, int j) {
  return *reinterpret_cast<const Four<float>*>(tile.scores + row * tile.stride + j);
}

template <bool kTables>
TDRO_DEVICE void read_columns(const TdroTile& tile, int64_t group, int j, ColumnMask* columns) {
  TDRO_UNROLL
  for (int k = 0; k < kVector; ++k) {
    if (kTables && j + k < tile.columns) columns[k] = column_mask<kTables>(tile, group * tile.columns + j + k);
  }
}

// Merge the threads' sums of each row; the result of row r is in shared[r * kThreads].
template <int kRows, class Block>
TDRO_DEVICE void merge_threads(Block& block) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    block.barrier();
    block.each([&](int thread) {
      if (thread >= half) return;
      TDRO_UNROLL
      for (int r = 0; r < kRows; ++r)
        merge(block.shared[r * kThreads + thread], block.shared[r * kThreads + thread + half]);
    });
  }
  block.barrier();
}

// Sum each row of the span over all columns of the tile, into shared[r * kThreads].
template <int kRows, bool kTables, class Block>
TDRO_DEVICE void sum_rows(Block& block, const TdroTile& tile, const RowSpan& span) {
  const float per_temperature = 1.0f / *tile.temperature;
  block.each([&](int thread) {
    RowMask rows[kRows];
    LogSum sums[kRows];
    ColumnMask columns[kVector] = {};
    TDRO_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sums[r] = no_scores();
      if (r < span.count) rows[r] = row_mask<kTables>(tile, span.group, span.first + r);
    }
    for (int j = thread * kVector; j < tile.columns; j += kStep) {
      read_columns<kTables>(tile, span.group, j, columns);
      TDRO_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (r >= span.count) continue;
        const Four<float> products = read_scores(tile, span.first + r, j);
        TDRO_UNROLL
        for (int k = 0; k < kVector; ++k)
          add(sums[r], score_of<kTables>(tile, rows[r], columns[k], j + k, products.items[k], per_temperature, 0.0f));
      }
    }
    TDRO_UNROLL
    for (int r = 0; r < kRows; ++r) block.shared[r * kThreads + thread] = sums[r];
  });
  merge_threads<kRows>(block);
}

template <int kRows, bool kTables>
struct RowStatistics {
  static constexpr int kShared = kRows * kThreads;
  TdroTile tile;
  float *row_max, *row_sum;

  template <class Block>
  TDRO_DEVICE void operator()(Block& block) const {
    const RowSpan span = row_span<kRows>(tile, block.index);
    sum_rows<kRows, kTables>(block, tile, span);
    block.each([&](int thread) {
      if (thread >= span.count) return;
      LogSum total{row_max[span.first + thread], row_sum[span.first + thread]};
      merge(total, block.shared[thread * kThreads]);
      row_max[span.first + thread] = total.largest;
      row_sum[span.first + thread] = total.sum;
    });
  }
};

// The sums of kColumnRows rows of kStep columns; the sums of all spans of rows are merged by MergeColumns.
template <bool kTables>
struct ColumnStatistics {
  static constexpr int kShared = 1;
  TdroTile tile;
  LogSum* partial;  // [spans of rows, groups * columns]

  template <class Block>
  TDRO_DEVICE void operator()(Block& block) const {
    const int64_t steps = (tile.columns + kStep - 1) / kStep, step = block.index % steps;
    const RowSpan span = row_span<kColumnRows>(tile, block.index / steps);
    const int64_t part = (span.first - span.group * tile.rows) / kColumnRows;
    const float per_temperature = 1.0f / *tile.temperature;
    block.each([&](int thread) {
      const int j = int(step) * kStep + thread * kVector;
      if (j >= tile.columns) return;
      ColumnMask columns[kVector] = {};
      read_columns<kTables>(tile, span.group, j, columns);
      LogSum sums[kVector] = {no_scores(), no_scores(), no_scores(), no_scores()};
      for (int r = 0; r < span.count; ++r) {
        const RowMask row = row_mask<kTables>(tile, span.group, span.first + r);
        const Four<float> products = read_scores(tile, span.first + r, j);
        TDRO_UNROLL
        for (int k = 0; k < kVector; ++k)
          add(sums[k], score_of<kTables>(tile, row, columns[k], j + k, products.items[k], per_temperature, 0.0f));
      }
      TDRO_UNROLL
      for (int k = 0; k < kVector; ++k) {
        if (j + k < tile.columns)
          partial[part * tile.groups * tile.columns + span.group * tile.columns + j + k] = sums[k];
      }
    });
  }
};

struct MergeColumns {
  static constexpr int kShared = 1;
  const LogSum* partial;  // [parts, columns]
  int64_t parts, columns;
  float *column_max, *column_sum;

  template <class Block>
  TDRO_DEVICE void operator()(Block& block) const {
    block.each([&](int thread) {
      const int64_t column = block.index * kThreads + thread;
      if (column >= columns) return;
      LogSum total{column_max[column], column_sum[column]};
      for (int64_t part = 0; part < parts; ++part) merge(total, partial[part * columns + column]);
      column_max[column] = total.largest;
      column_sum[column] = total.sum;
    });
  }
};

// What a row makes of its scores: factor exp((score - large) - small). A total of 400 has steps of 3e-5; its loss, the
// small part, has finer ones, and an error that all shares of a row have in common is worse than one of each.
struct RowShare {
  float large, small, factor;
};

template <int kRows>
struct WriterState {
  RowMask rows[kRows];
  RowShare shares[kRows];
  float values[kRows][kVector];
  float residuals[kRows];
};

// Put shares into the places of the scores of the span. In half precision a row of shares fills the first half of its
// row of scores: all threads have read a step before any writes it, and a step writes nowhere that a later one reads.
template <int kRows, bool kTables, class Storage, class Block, class ShareOf>
TDRO_DEVICE void write_shares(Block& block, const TdroTile& tile, const RowSpan& span, const float* column_totals,
                              const float* column_factors, float* residuals, ShareOf share_of) {
  const float per_temperature = 1.0f / *tile.temperature;
  typename Block::template PerThread<WriterState<kRows>> states;
  block.each([&](int thread) {
    WriterState<kRows>& own = states.of(thread);
    TDRO_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r >= span.count) continue;
      own.rows[r] = row_mask<kTables>(tile, span.group, span.first + r);
      own.shares[r] = share_of(r);
      own.residuals[r] = 0.0f;
    }
  });
  for (int step = 0; step < tile.columns; step += kStep) {
    block.each([&](int thread) {
      const int j = step + thread * kVector;
      if (j >= tile.columns) return;
      WriterState<kRows>& own = states.of(thread);
      ColumnMask columns[kVector] = {};
      read_columns<kTables>(tile, span.group, j, columns);
      TDRO_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (r >= span.count) continue;
        const Four<float> products = read_scores(tile, span.first + r, j);
        TDRO_UNROLL
        for (int k = 0; k < kVector; ++k) {
          const auto score_less = [&](float less) {
            return score_of<kTables>(tile, own.rows[r], columns[k], j + k, products.items[k], per_temperature, less);
          };
          const RowShare& share = own.shares[r];
          own.values[r][k] = share.factor * expf(score_less(share.large) - share.small);
          if (column_totals && j + k < tile.columns) {
            const int64_t column = span.group * tile.columns + j + k;
            own.values[r][k] += column_factors[column] * expf(score_less(column_totals[column]));
          }
        }
      }
    });
    block.barrier();
    block.each([&](int thread) {
      const int j = step + thread * kVector;
      if (j >= tile.columns) return;
      TDRO_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (r >= span.count) continue;
        WriterState<kRows>& own = states.of(thread);
        Four<Storage> narrowed;
        TDRO_UNROLL
        for (int k = 0; k < kVector; ++k) {
          narrow(own.values[r][k], narrowed.items[k]);
          own.residuals[r] += own.values[r][k] - widen(narrowed.items[k]);
        }
        float* const row = tile.scores + (span.first + r) * tile.stride;
        *reinterpret_cast<Four<Storage>*>(reinterpret_cast<Storage*>(row) + j) = narrowed;
      }
    });
  }
  if (!residuals) return;
  block.barrier();  // what share_of reads of shared memory is read
  block.each([&](int thread) {
    TDRO_UNROLL
    for (int r = 0; r < kRows; ++r)
      block.shared[r * kThreads + thread] = {0.0f, r < span.count ? states.of(thread).residuals[r] : 0.0f};
  });
  merge_threads<kRows>(block);  // of one largest: a plain sum
  block.each([&](int thread) {
    if (thread < span.count) residuals[span.first + thread] += block.shared[thread * kThreads].sum;
  });
}

template <int kRows, bool kTables, class Storage>
struct Gradient {
  static constexpr int kShared = kRows * kThreads;
  TdroTile tile;
  const float *row_totals, *row_factors, *column_totals, *column_factors;
  float* residuals;

  template <class Block>
  TDRO_DEVICE void operator()(Block& block) const {
    const RowSpan span = row_span<kRows>(tile, block.index);
    write_shares<kRows, kTables, Storage>(block, tile, span, column_totals, column_factors, residuals, [&](int r) {
      return RowShare{row_totals[span.first + r], 0.0f, row_factors[span.first + r]};
    });
  }
};

template <int kRows, bool kTables, class Storage>
struct Softmax {
  static constexpr int kShared = kRows * kThreads;
  TdroTile tile;
  const float *positive_scores, *row_weights;
  float *losses, *residuals;

  template <class Block>
  TDRO_DEVICE void operator()(Block& block) const {
    const RowSpan span = row_span<kRows>(tile, block.index);
    sum_rows<kRows, kTables>(block, tile, span);
    const auto loss_of = [&](int r) {
      return softplus(logsumexp(block.shared[r * kThreads]) - positive_scores[span.first + r]);
    };
    block.each([&](int thread) {
      if (thread < span.count) losses[span.first + thread] = loss_of(thread);
    });
    write_shares<kRows, kTables, Storage>(block, tile, span, nullptr, nullptr, residuals, [&](int r) {
      return RowShare{positive_scores[span.first + r], loss_of(r), row_weights[span.first + r]};
    });
  }
};

}  // namespace tdro_tiles
