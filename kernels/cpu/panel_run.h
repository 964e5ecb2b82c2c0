// The work on one group in steps: panel.cpp prepares, scores and adds up, panel_gradients.cpp forms the gradients,
// panel_blocks.cpp does the same for few columns.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "panel.h"

namespace tdro {

constexpr int64_t MAX_TILE_COLUMNS = 128;  // of a strip; as many documents' gradients fit a thread's room
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// A thread's own room for one tile.
struct Scratch {
  Scratch(int owner, int64_t rows, int64_t columns, bool pairs)
      : thread(owner),
        scores(rows * columns),
        share_lanes(pairs ? rows * columns / 2 : 0),
        share_rows(pairs ? rows * columns / 2 : 0),
        gradient(std::max<int64_t>(std::min(columns, MAX_TILE_COLUMNS), LANES) * LANES),
        factors(std::max<int64_t>(rows, LANES)),
        sums(std::max<int64_t>(rows, LANES)),
        column_floats(5 * columns),
        column_ids(columns) {}

  int thread;
  Buffer<float> scores;  // [row block][column][32]
  Buffer<uint32_t> share_lanes, share_rows;
  Buffer<float> gradient;  // [column][32]
  Buffer<float> factors, sums, column_floats;
  Buffer<int32_t> column_ids;
};

// A tile's documents, packed for the scores and for dQ; the same for both but in pairs.
struct PackedTile {
  PackedTile(int64_t columns, int64_t width, bool pairs, bool of_queries)
      : for_scores(blocks_of(width) * columns * (pairs ? LANES / 2 : LANES)),
        pairs_for_queries(pairs && of_queries ? blocks_of(width) * columns / 2 * LANES : 0) {}

  Buffer<uint32_t> for_scores, pairs_for_queries;
};

class GroupRun {
 public:
  GroupRun(const Call& call, int32_t group, const Sizes& sizes, const Parallel& parallel, const Kept& kept);
  void run();

 private:
  struct Tile {
    int64_t first, count, padded;  // columns of the group; padded to pairs
    const PackedTile& documents;
  };
  struct Blocks {
    int64_t first, count;  // of the panel's rows
  };

  void begin_panel();
  void look_up_rows();
  void pack_rows(int64_t block);
  void statistics_of_strip(int64_t strip, Scratch& scratch);
  void merge_strips(int64_t first, int64_t last);
  void gradients_of_strip(int64_t strip, Scratch& scratch);
  void end_panel();
  void end_columns();

  int64_t most_block_tasks() const;
  void run_blocks();
  void pack_columns(int64_t block);
  void statistics_of_block(int64_t block, Scratch& scratch);
  void shares_of_block(int64_t block, Scratch& scratch);
  void query_gradients(int64_t first, int64_t last, Scratch& scratch);
  void document_gradients(int64_t first, int64_t last, Scratch& scratch);

  Tile tile_at(int64_t number, int thread) const;
  void pack_documents(const Tile& tile, bool for_gradient) const;
  void raw_scores(const Tile& tile, const Blocks& blocks, float* scores) const;
  void finish(const Tile& tile, const Blocks& blocks, Scratch& scratch, float* scores, float* highest) const;
  void merge_columns(const Tile& tile, Scratch& scratch, const float* scores);
  void shares_of(const Tile& tile, int64_t number, int64_t strip, Scratch& scratch);
  void add_gradients(const Tile& tile, int64_t strip, bool first, Scratch& scratch);
  float* panel_shares() const { return shares_.data() ? shares_.data() : kept_; }
  int64_t strip_start(int64_t strip) const { return strip * tiles_ / sizes_.strips; }
  // Of a strip's sums of the queries' gradients; null for the first, whose sums are formed in the gradient itself.
  float* query_part(int64_t strip, int64_t dim, int64_t lane) {
    return strip < straight_ ? nullptr
                             : &query_parts_[(((strip - straight_) * dims_ + dim) * lanes_ + lane) * LANES];
  }

  const Call& call_;
  const Problem& problem_;
  const TileKernels& kernels_;
  const int32_t number_;
  const Group& group_;
  const Sizes sizes_;
  const Parallel& parallel_;
  const Kept kept_outside_;
  const int64_t dims_, tiles_;  // blocks of dimensions; tiles of columns
  const int64_t straight_;      // strips whose sums of the queries' gradients need no room of their own
  const bool of_queries_, of_documents_;  // whose gradients are asked for
  int64_t first_ = 0, rows_ = 0, row_blocks_ = 0, lanes_ = 0;  // of the panel; lanes = row blocks * 32

  Buffer<uint32_t> transposed_, by_dimension_;  // the panel's queries, packed for the scores and for dD
  Buffer<float> middle_;  // [dimension block][32], mean of the panel's queries where products are of pairs
  Buffer<float> totals_, factors_, positive_factors_, limits_;
  Buffer<int32_t> positive_ids_, known_ids_;
  std::vector<int64_t> place_;             // of each row's positive within the group, or -1
  Buffer<float> strip_highest_, strip_sums_;  // [strip][lanes]
  Buffer<float> kept_inside_;  // of a panel, where the gradients follow at once
  float *kept_ = nullptr, *kept_highest_ = nullptr;  // [tile][row block][column][32], [tile][lanes]; null = not kept
  Buffer<float> shares_;  // as kept_, by blocks where nothing is kept here
  Buffer<float> query_parts_;                 // [strip, without straight_][dimension block][lanes][32]
  Buffer<float> column_highest_, column_sums_;  // [columns of the group]
  std::vector<Scratch> scratch_;
  std::vector<PackedTile> packed_;  // one a tile where they are held, else one a thread
};

}  // namespace tdro
