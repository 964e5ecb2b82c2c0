// The functions of tiles.h, for any way to run blocks: whoever includes this has declared
//   template <class Body> int launch(int64_t blocks, const Body& body, void* stream);
// which runs body(block) for blocks 0 to blocks - 1.
#pragma once
#include "bodies.h"
#include "positives.h"

namespace tdro_tiles {

// Few rows a block keep every multiprocessor busy; several use what is read of a column several times.
constexpr int kManyRows = 4;
constexpr int64_t kEnoughRows = 2048;

inline int64_t row_blocks(const TdroTile& tile, int64_t rows) { return tile.groups * ((tile.rows + rows - 1) / rows); }

template <class Storage>
struct StoredAs {
  using Type = Storage;
};

template <class Use>
int with_storage(int storage, Use use) {
  if (storage == TDRO_BFLOAT16) return use(StoredAs<Bfloat16>{});
  if (storage == TDRO_FLOAT16) return use(StoredAs<Float16>{});
  return use(StoredAs<float>{});
}

template <int kRows, bool kTables>
int row_statistics(const TdroTile& tile, float* row_max, float* row_sum, void* stream) {
  return launch(row_blocks(tile, kRows), RowStatistics<kRows, kTables>{tile, row_max, row_sum}, stream);
}

template <bool kTables>
int column_statistics(const TdroTile& tile, LogSum* partial, float* column_max, float* column_sum, void* stream) {
  const int64_t parts = (tile.rows + kColumnRows - 1) / kColumnRows, columns = tile.groups * tile.columns;
  const int64_t steps = (tile.columns + kStep - 1) / kStep;
  const int error = launch(tile.groups * parts * steps, ColumnStatistics<kTables>{tile, partial}, stream);
  if (error) return error;
  const MergeColumns merge_columns{partial, parts, columns, column_max, column_sum};
  return launch((columns + kThreads - 1) / kThreads, merge_columns, stream);
}

template <int kRows, bool kTables>
int gradient(const TdroTile& tile, const float* const (&vectors)[4], float* residuals, int storage, void* stream) {
  return with_storage(storage, [&](auto stored) {
    using Storage = typename decltype(stored)::Type;
    const Gradient<kRows, kTables, Storage> body{tile, vectors[0], vectors[1], vectors[2], vectors[3], residuals};
    return launch(row_blocks(tile, kRows), body, stream);
  });
}

template <int kRows, bool kTables>
int softmax(const TdroTile& tile, const float* positive_scores, const float* row_weights, float* losses,
            float* residuals, int storage, void* stream) {
  return with_storage(storage, [&](auto stored) {
    using Storage = typename decltype(stored)::Type;
    const Softmax<kRows, kTables, Storage> body{tile, positive_scores, row_weights, losses, residuals};
    return launch(row_blocks(tile, kRows), body, stream);
  });
}

}  // namespace tdro_tiles

extern "C" {

int tdro_tile_row_statistics(const TdroTile* tile, float* row_max, float* row_sum, void* stream) {
  using namespace tdro_tiles;
  const auto run = [&](auto function) { return function(*tile, row_max, row_sum, stream); };
  const bool many = tile->rows >= kManyRows && tile->groups * tile->rows >= kEnoughRows;
  if (has_tables(*tile)) return many ? run(row_statistics<kManyRows, true>) : run(row_statistics<1, true>);
  return many ? run(row_statistics<kManyRows, false>) : run(row_statistics<1, false>);
}

int64_t tdro_tile_column_scratch(const TdroTile* tile) {
  return (tile->rows + tdro_tiles::kColumnRows - 1) / tdro_tiles::kColumnRows * tile->groups * tile->columns * 2;
}

int tdro_tile_column_statistics(const TdroTile* tile, float* scratch, float* column_max, float* column_sum,
                                void* stream) {
  using namespace tdro_tiles;
  LogSum* const partial = reinterpret_cast<LogSum*>(scratch);
  return has_tables(*tile) ? column_statistics<true>(*tile, partial, column_max, column_sum, stream)
                           : column_statistics<false>(*tile, partial, column_max, column_sum, stream);
}

int tdro_tile_gradient(const TdroTile* tile, const float* row_totals, const float* row_factors,
                       const float* column_totals, const float* column_factors, float* residuals, int storage,
                       void* stream) {
  using namespace tdro_tiles;
  const float* const vectors[4] = {row_totals, row_factors, column_totals, column_factors};
  const auto run = [&](auto function) { return function(*tile, vectors, residuals, storage, stream); };
  const bool many = tile->rows >= kManyRows && tile->groups * tile->rows >= kEnoughRows;
  if (has_tables(*tile)) return many ? run(gradient<kManyRows, true>) : run(gradient<1, true>);
  return many ? run(gradient<kManyRows, false>) : run(gradient<1, false>);
}

// A block reads its rows twice. One row of 32k scores is still in the L2 cache the second time, four are not; but with
// tables four rows that share what is read of the columns cost less.
int tdro_tile_softmax(const TdroTile* tile, const float* positive_scores, const float* row_weights, float* losses,
                      float* residuals, int storage, void* stream) {
  using namespace tdro_tiles;
  const auto run = [&](auto function) {
    return function(*tile, positive_scores, row_weights, losses, residuals, storage, stream);
  };
  const bool many = tile->rows >= kManyRows && tile->groups * tile->rows >= kEnoughRows / 4;
  if (!has_tables(*tile)) return run(softmax<1, false>);
  return many ? run(softmax<kManyRows, true>) : run(softmax<1, true>);
}

int tdro_positive_scores(const TdroPositives* sides, const float* temperature, float* scores, void* stream) {
  using namespace tdro_tiles;
  return with_storage(sides->storage, [&](auto stored) {
    using Storage = typename decltype(stored)::Type;
    return launch(sides->rows, PositiveScores<Storage>{*sides, temperature, scores}, stream);
  });
}

int tdro_add_positives(const TdroPositives* sides, const float* query_factors, const float* document_factors,
                       const int64_t* order, float* query_gradient, float* document_gradient, void* stream) {
  using namespace tdro_tiles;
  return with_storage(sides->storage, [&](auto stored) {
    using Storage = typename decltype(stored)::Type;
    const int error = launch(sides->rows, AddToQueries<Storage>{*sides, query_factors, query_gradient}, stream);
    if (error) return error;
    return launch(sides->rows, AddToDocuments<Storage>{*sides, document_factors, order, document_gradient}, stream);
  });
}

}  // extern "C"
