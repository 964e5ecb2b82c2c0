// Few columns: every thread takes blocks of rows from their scores to their shares, then blocks of dimensions of both
// gradients. Threads meet twice a panel, and no sum has to be put together of parts. Nothing is given back to the positive
// as in end_panel: near cosine 1 it would take a third off the rounding of so few shares, for 2 to 5 % of the time.
#include "panel_run.h"

namespace tdro {
namespace {

constexpr int64_t DIMS_AT_ONCE = 4;  // blocks of dimensions that read the same shares one after the other

int64_t parts_of(int64_t dims) { return (dims + DIMS_AT_ONCE - 1) / DIMS_AT_ONCE; }

}  // namespace

int64_t GroupRun::most_block_tasks() const {
  return std::max(blocks_of(sizes_.panel_rows), 2 * parts_of(dims_));
}

void GroupRun::run_blocks() {
  const int64_t parts = parts_of(dims_), of_queries = of_queries_ ? parts : 0, of_documents = of_documents_ ? parts : 0;
  if (first_ == 0)
    parallel_.run(blocks_of(group_.columns.count), [&](int64_t block, int) { pack_columns(block); });
  parallel_.run(row_blocks_, [&](int64_t block, int thread) {
    pack_rows(block);
    if (!call_.shares) statistics_of_block(block, scratch_[thread]);
    if (of_queries + of_documents) shares_of_block(block, scratch_[thread]);
  });
  parallel_.run(of_queries + of_documents, [&](int64_t task, int thread) {
    const int64_t first = task % parts * DIMS_AT_ONCE, last = std::min(dims_, first + DIMS_AT_ONCE);
    if (task < of_queries)
      query_gradients(first, last, scratch_[thread]);
    else
      document_gradients(first, last, scratch_[thread]);
  });
}

void GroupRun::pack_columns(int64_t block) {
  const Span& members = group_.columns;
  const int64_t start = block * LANES, count = std::min<int64_t>(LANES, members.count - start);
  const Rows rows{problem_.documents, problem_.type, problem_.width, members.first + start, count,
                  members.index ? members.index + start : nullptr};
  pack_lanes(rows, members.count, reinterpret_cast<float*>(packed_[0].for_scores.data()) + start * LANES);
}

void GroupRun::statistics_of_block(int64_t block, Scratch& scratch) {
  const Tile tile = tile_at(0, 0);
  const int64_t lane = block * LANES;
  float* scores = kept_ ? kept_ + lane * tile.padded : scratch.scores.data();
  float *highest = &strip_highest_[lane], *sums = &strip_sums_[lane];
  raw_scores(tile, {block, 1}, scores);
  finish(tile, {block, 1}, scratch, scores, highest);
  kernels_.exponentials(scores, 1, tile.padded, highest, sums);
  if (kept_) std::copy_n(highest, LANES, kept_highest_ + lane);
  merge_strips(lane, std::min(rows_, lane + LANES));
}

void GroupRun::shares_of_block(int64_t block, Scratch& scratch) {
  const Tile tile = tile_at(0, 0);
  const int64_t lane = block * LANES;
  float* shares = panel_shares() + lane * tile.padded;
  if (kept_) {
    kernels_.row_scales(kept_highest_ + lane, &totals_[lane], &factors_[lane], scratch.factors.data(), LANES);
    kernels_.scale_rows(kept_ + lane * tile.padded, shares, 1, tile.padded, scratch.factors.data());
  } else {
    raw_scores(tile, {block, 1}, shares);
    finish(tile, {block, 1}, scratch, shares, scratch.sums.data());
    kernels_.shares(shares, 1, tile.padded, &totals_[lane], &factors_[lane], nullptr, nullptr);
  }
  for (int64_t i = 0; i < std::min<int64_t>(LANES, rows_ - lane); ++i) {
    const int64_t column = place_[lane + i];
    if (column >= 0) shares[column * LANES + i] += positive_factors_[lane + i];
  }
}

void GroupRun::query_gradients(int64_t first, int64_t last, Scratch& scratch) {
  const Tile tile = tile_at(0, 0);
  for (int64_t block = 0; block < row_blocks_; ++block) {
    const int64_t rows = std::min<int64_t>(LANES, rows_ - block * LANES), start = first_ + block * LANES;
    for (int64_t dim = first; dim < last; ++dim) {
      const int64_t width = std::min<int64_t>(LANES, problem_.width - dim * LANES);
      const bool direct = !group_.rows.index && width == LANES;
      float* const target = call_.query_gradient + (group_.rows.first + start) * problem_.width + dim * LANES;
      kernels_.product_lanes({rows, tile.count, panel_shares() + block * tile.padded * LANES, 0,
                              &tile.documents.for_scores[dim * tile.padded * LANES],
                              direct ? target : scratch.gradient.data(), direct ? problem_.width : LANES, false});
      for (int64_t i = 0; !direct && i < rows; ++i)
        kernels_.add_lanes(call_.query_gradient + group_.rows.member(start + i) * problem_.width + dim * LANES,
                           &scratch.gradient[i * LANES], width, false);
    }
  }
}

void GroupRun::document_gradients(int64_t first, int64_t last, Scratch& scratch) {
  const Tile tile = tile_at(0, 0);
  const bool add = first_ > 0;
  for (int64_t start = 0; start < tile.count; start += MAX_TILE_COLUMNS) {
    const int64_t count = std::min(MAX_TILE_COLUMNS, tile.count - start);
    for (int64_t dim = first; dim < last; ++dim) {
      const int64_t width = std::min<int64_t>(LANES, problem_.width - dim * LANES);
      const bool direct = !group_.columns.index && width == LANES;
      float* const target = call_.document_gradient + (group_.columns.first + start) * problem_.width + dim * LANES;
      kernels_.product_rows({count, rows_, panel_shares() + start * LANES, tile.padded * LANES,
                             &by_dimension_[dim * rows_ * LANES], direct ? target : scratch.gradient.data(),
                             direct ? problem_.width : LANES, direct && add});
      for (int64_t c = 0; !direct && c < count; ++c)
        kernels_.add_lanes(call_.document_gradient + group_.columns.member(start + c) * problem_.width + dim * LANES,
                           &scratch.gradient[c * LANES], width, add);
    }
  }
}

}  // namespace tdro
