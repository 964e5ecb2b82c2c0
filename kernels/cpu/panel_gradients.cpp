// From the statistics of a panel's rows to the gradients of its queries and of all documents.
#include <cmath>

#include "panel_run.h"

namespace tdro {

// Into scratch.scores: the share of each pair in the gradient, over the temperature.
void GroupRun::shares_of(const Tile& tile, int64_t number, int64_t strip, Scratch& scratch) {
  float* shares = scratch.scores.data();
  if (kept_) {
    const float* highest = kept_highest_ + number * lanes_;
    kernels_.row_scales(highest, totals_.data(), factors_.data(), scratch.factors.data(), lanes_);
    kernels_.scale_rows(kept_ + number * sizes_.tile_columns * lanes_, shares, row_blocks_, tile.padded,
                        scratch.factors.data());
  } else {
    raw_scores(tile, {0, row_blocks_}, shares);
    finish(tile, {0, row_blocks_}, scratch, shares, scratch.sums.data());
    float *totals = nullptr, *factors = nullptr;
    if (call_.shares && call_.shares->column_totals) {
      totals = scratch.column_floats.data() + tile.padded, factors = totals + tile.padded;
      for (int64_t c = 0; c < tile.padded; ++c) {
        const int64_t column = group_.columns.member(tile.first + std::min(c, tile.count - 1));
        totals[c] = call_.shares->column_totals[column];
        factors[c] = call_.shares->column_factors[column] / problem_.temperature;
      }
    }
    kernels_.shares(shares, row_blocks_, tile.padded, totals_.data(), factors_.data(), totals, factors);
    if (totals && kernels_.pairs && rows_ < lanes_)  // what is no row, and may be near to such a column
      for (int64_t c = 0; c < tile.padded; ++c)
        std::fill_n(&shares[(rows_ / LANES * tile.padded + c) * LANES + rows_ % LANES], lanes_ - rows_, 0.0f);
  }
  if (call_.all_columns && of_queries_)
    kernels_.take_rows(shares, row_blocks_, tile.padded, &strip_sums_[strip * lanes_]);
  for (int64_t i = 0; i < rows_; ++i) {
    const int64_t column = place_[i] - tile.first;
    if (column >= 0 && column < tile.count)
      shares[(i / LANES * tile.padded + column) * LANES + i % LANES] += positive_factors_[i];
  }
}

void GroupRun::gradients_of_strip(int64_t strip, Scratch& scratch) {
  std::fill_n(&strip_sums_[strip * lanes_], lanes_, 0.0f);  // from here on: what the row's shares lack of 0
  for (int64_t number = strip_start(strip); number < strip_start(strip + 1); ++number) {
    const Tile tile = tile_at(number, scratch.thread);
    pack_documents(tile, true);
    shares_of(tile, number, strip, scratch);
    add_gradients(tile, strip, number == strip_start(strip), scratch);
  }
}

void GroupRun::add_gradients(const Tile& tile, int64_t strip, bool first, Scratch& scratch) {
  const void *by_lane = scratch.scores.data(), *by_row = scratch.scores.data();
  const void* documents = tile.documents.for_scores.data();
  float* const lost = scratch.column_floats.data() + 3 * tile.padded;  // of each column, by rounding its shares
  int64_t column_steps = tile.padded, row_steps = rows_, block_lanes = LANES;
  if (kernels_.pairs) {
    if (of_documents_)
      kernels_.lane_pairs(scratch.scores.data(), scratch.share_lanes.data(), row_blocks_, tile.padded, lost);
    for (int64_t block = 0; of_queries_ && block < row_blocks_; ++block)
      kernels_.row_pairs(&scratch.scores[block * tile.padded * LANES],
                         &scratch.share_rows[block * tile.padded / 2 * LANES], tile.padded,
                         &strip_sums_[strip * lanes_ + block * LANES]);
    by_lane = scratch.share_lanes.data(), by_row = scratch.share_rows.data();
    documents = tile.documents.pairs_for_queries.data();
    column_steps /= 2, row_steps = (rows_ + 1) / 2, block_lanes = LANES / 2;
  }
  const uint32_t *shares = static_cast<const uint32_t*>(by_row), *packed = static_cast<const uint32_t*>(documents);
  for (int64_t dim = 0; dim < dims_; ++dim) {
    const int64_t width = std::min<int64_t>(LANES, problem_.width - dim * LANES);
    for (int64_t block = 0; of_queries_ && block < row_blocks_; ++block) {
      Product product{std::min<int64_t>(LANES, rows_ - block * LANES), column_steps,
                      shares + block * column_steps * LANES, 0, packed + dim * column_steps * LANES,
                      query_part(strip, dim, block * LANES), LANES, !first};
      if (!product.c) {
        const int64_t row = group_.rows.first + first_ + block * LANES;
        product.c = call_.query_gradient + row * problem_.width + dim * LANES, product.c_row = problem_.width;
      }
      kernels_.product_lanes(product);
    }
    if (!of_documents_) continue;
    Product product{tile.count, row_steps, by_lane, tile.padded * block_lanes,
                    &by_dimension_[dim * row_steps * LANES], scratch.gradient.data(), LANES, false};
    if (!group_.columns.index && width == LANES) {  // straight to where it belongs
      product.c = call_.document_gradient + (group_.columns.first + tile.first) * problem_.width + dim * LANES;
      product.c_row = problem_.width;
      product.add = first_ > 0;
    }
    kernels_.product_rows(product);
    if (kernels_.pairs) kernels_.add_outer(product.c, product.c_row, tile.count, lost, &middle_[dim * LANES]);
    for (int64_t c = 0; product.c == scratch.gradient.data() && c < tile.count; ++c)
      kernels_.add_lanes(call_.document_gradient + group_.columns.member(tile.first + c) * problem_.width + dim * LANES,
                         &scratch.gradient[c * LANES], width, first_ > 0);
  }
}

// The strips' parts of the queries' gradients, added in the order of the strips. A row's shares add up to 0, so that
// what its documents have in common cancels; formed of rounded scores, or rounded to bfloat16, not quite: the positive
// gets what they lack.
void GroupRun::end_panel() {
  const Rows documents{problem_.documents, problem_.type, problem_.width, 0, problem_.columns, nullptr};
  parallel_.run(row_blocks_, [&](int64_t block, int) {
    std::vector<float> positive(problem_.type == Type::float32 ? 0 : problem_.width);
    for (int64_t i = block * LANES; i < std::min(rows_, (block + 1) * LANES); ++i) {
      const int64_t row = group_.rows.member(first_ + i);
      float* target = call_.query_gradient + row * problem_.width;
      for (int64_t dim = 0; dim < dims_; ++dim) {
        const int64_t width = std::min<int64_t>(LANES, problem_.width - dim * LANES);
        for (int64_t strip = straight_; strip < sizes_.strips; ++strip)
          kernels_.add_lanes(target + dim * LANES, query_part(strip, dim, i), width, strip > 0);
      }
      if (!kernels_.pairs && !call_.all_columns) continue;
      float lost = call_.all_columns ? -positive_factors_[i] : 0.0f;
      for (int64_t strip = 0; strip < sizes_.strips; ++strip) lost += strip_sums_[strip * lanes_ + i];
      const int64_t own = problem_.positives[row];  // which may be in another group, or not among these columns
      const int64_t column = own >= 0 && own < problem_.columns ? own : group_.columns.member(0);
      kernels_.add_scaled(target, wide_row(documents, column, positive.data()), lost, problem_.width);
    }
  });
}

}  // namespace tdro
