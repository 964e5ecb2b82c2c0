#include "panel.h"

#include <cmath>

#include "panel_run.h"

namespace tdro {
namespace {

constexpr int64_t STEP_BLOCKS = 6;  // of 32 dimensions that scores sum at a time: the operands stay in the first cache
constexpr int64_t MAX_PANEL_ROWS = 256;
constexpr int64_t MAX_STRIPS = 16, STRIP_COLUMNS = 540;
constexpr int64_t HELD_BYTES = 4 << 20;
constexpr int64_t BLOCKS_COLUMNS = 1024, BLOCKS_BYTES = 2 << 20;  // up to so many there is no need of strips

// How many strips form their sums of the queries' gradients in the gradient itself: the first, where its rows lie beside
// each other and all blocks of dimensions are whole.
int64_t straight_strips(const Group& group, int64_t width) { return !group.rows.index && width % LANES == 0 ? 1 : 0; }

}  // namespace

GroupRun::GroupRun(const Call& call, int32_t group, const Sizes& sizes, const Parallel& parallel, const Kept& kept)
    : call_(call),
      problem_(call.problem),
      kernels_(call.kernels),
      number_(group),
      group_(call.groups.groups[group]),
      sizes_(sizes),
      parallel_(parallel),
      kept_outside_(kept),
      dims_(blocks_of(problem_.width)),
      tiles_((group_.columns.count + sizes.tile_columns - 1) / sizes.tile_columns),
      straight_(straight_strips(group_, problem_.width)),
      of_queries_(call.query_gradient != nullptr),
      of_documents_(call.document_gradient != nullptr) {
  const int64_t lanes = sizes.panel_rows, packed = lanes * dims_ * (kernels_.pairs ? LANES / 2 : LANES);
  transposed_.reset(packed);
  if (of_documents_) by_dimension_.reset(packed);
  if (of_documents_ && kernels_.pairs) middle_.reset(dims_ * LANES);
  for (Buffer<float>* rows : {&totals_, &factors_, &positive_factors_, &limits_}) rows->reset(lanes);
  positive_ids_.reset(lanes);
  known_ids_.reset(lanes * problem_.known);
  place_.resize(lanes);
  strip_highest_.reset(sizes.strips * lanes);
  strip_sums_.reset(sizes.strips * lanes);
  if (sizes.keep) kept_inside_.reset(kept_floats_of(group_, sizes));
  if (of_queries_ && !sizes.by_blocks) query_parts_.reset((sizes.strips - straight_) * lanes * dims_ * LANES);
  if (call.column_negatives) {
    column_highest_.reset(group_.columns.count);
    column_sums_.reset(group_.columns.count);
    std::fill(&column_highest_[0], &column_highest_[0] + group_.columns.count, LOWEST);
    std::fill(&column_sums_[0], &column_sums_[0] + group_.columns.count, 0.0f);
  }
  if (sizes.by_blocks && !sizes.keep && (of_queries_ || of_documents_)) shares_.reset(lanes * sizes.tile_columns);
  const int64_t threads = std::min<int64_t>(parallel.threads, sizes.by_blocks ? most_block_tasks() : sizes.strips);
  const bool all_kept = sizes.keep || call.shares || kept.panels * lanes >= group_.rows.count;
  const int64_t own_lanes = !sizes.by_blocks ? lanes : all_kept ? 0 : LANES;
  for (int64_t i = 0; i < threads; ++i) scratch_.emplace_back(int(i), own_lanes, sizes.tile_columns, kernels_.pairs);
  for (int64_t i = 0; i < (sizes.hold ? tiles_ : threads); ++i)
    packed_.emplace_back(sizes.tile_columns, problem_.width, kernels_.pairs, of_queries_);
}

void GroupRun::run() {
  for (first_ = 0; first_ < group_.rows.count; first_ += sizes_.panel_rows) {
    begin_panel();
    if (sizes_.by_blocks) {
      run_blocks();
      continue;
    }
    if (!call_.shares) {
      parallel_.run(sizes_.strips, [&](int64_t strip, int thread) { statistics_of_strip(strip, scratch_[thread]); });
      merge_strips(0, rows_);
    }
    if (of_queries_ || of_documents_) {
      parallel_.run(sizes_.strips, [&](int64_t strip, int thread) { gradients_of_strip(strip, scratch_[thread]); });
      if (of_queries_) end_panel();
    }
  }
  if (call_.column_negatives) end_columns();
}

void GroupRun::begin_panel() {
  rows_ = std::min(sizes_.panel_rows, group_.rows.count - first_);
  row_blocks_ = blocks_of(rows_);
  lanes_ = row_blocks_ * LANES;
  const int64_t panel = first_ / sizes_.panel_rows;
  kept_ = panel < kept_outside_.panels ? kept_outside_.memory + panel * kept_floats_of(group_, sizes_)
                                       : kept_inside_.data();
  kept_highest_ = kept_ ? kept_ + tiles_ * sizes_.tile_columns * lanes_ : nullptr;
  look_up_rows();
  if (sizes_.by_blocks) return;
  parallel_.run(row_blocks_, [&](int64_t block, int) { pack_rows(block); });
  const int64_t pairs = (rows_ + 1) / 2;
  for (int64_t dim = 0; dim < dims_ && middle_.data(); ++dim)
    kernels_.pair_means(&by_dimension_[dim * pairs * LANES], rows_, &middle_[dim * LANES]);
}

void GroupRun::look_up_rows() {
  const float scale = 1.0f / problem_.temperature;
  for (int64_t i = 0; i < lanes_; ++i) {
    const bool real = i < rows_;
    const int64_t row = real ? group_.rows.member(first_ + i) : 0;
    const int64_t positive = real ? problem_.positives[row] : -1;
    place_[i] = positive >= 0 && positive < problem_.columns ? call_.groups.place(positive, number_) : -1;
    limits_[i] = real ? call_.positive_scores[row] - problem_.margin * scale : LOWEST;
    positive_ids_[i] = real && !call_.ids.positives.empty() ? call_.ids.positives[row] : -2;
    for (int64_t k = 0; k < problem_.known && !call_.ids.known.empty(); ++k)
      known_ids_[k * lanes_ + i] = real ? call_.ids.known[row * problem_.known + k] : -2;
    totals_[i] = factors_[i] = positive_factors_[i] = 0.0f;
    if (!real || !call_.shares) continue;
    totals_[i] = call_.shares->row_totals[row];
    factors_[i] = call_.shares->row_factors[row] * scale;
    positive_factors_[i] = call_.shares->positive_factors[row] * scale;
  }
}

void GroupRun::pack_rows(int64_t block) {
  const Span& members = group_.rows;
  const int64_t start = first_ + block * LANES, count = std::min<int64_t>(LANES, first_ + rows_ - start);
  const Rows rows{problem_.queries, problem_.type, problem_.width, members.first + start, count,
                  members.index ? members.index + start : nullptr};
  const bool scores_follow = !call_.shares || !kept_;
  if (kernels_.pairs) {
    if (scores_follow) pack_transposed_pairs(rows, &transposed_[block * ((problem_.width + 1) / 2) * LANES]);
    if (of_documents_) pack_row_pairs(rows, (rows_ + 1) / 2, &by_dimension_[block * LANES / 2 * LANES]);
  } else {
    if (scores_follow) pack_transposed(rows, reinterpret_cast<float*>(&transposed_[block * problem_.width * LANES]));
    if (of_documents_) pack_lanes(rows, rows_, reinterpret_cast<float*>(&by_dimension_[block * LANES * LANES]));
  }
}

GroupRun::Tile GroupRun::tile_at(int64_t number, int thread) const {
  const int64_t first = number * sizes_.tile_columns;
  const int64_t count = std::min(sizes_.tile_columns, group_.columns.count - first);
  return {first, count, kernels_.pairs ? (count + 1) / 2 * 2 : count, packed_[sizes_.hold ? number : thread]};
}

void GroupRun::pack_documents(const Tile& tile, bool for_gradient) const {
  const bool second = for_gradient && !call_.shares;  // of two sweeps over the tiles
  if (sizes_.hold && (first_ > 0 || (second && !kernels_.pairs))) return;  // done before
  const Span& members = group_.columns;
  const Rows rows{problem_.documents, problem_.type, problem_.width, members.first + tile.first, tile.count,
                  members.index ? members.index + tile.first : nullptr};
  if (!kernels_.pairs) {
    pack_lanes(rows, tile.count, reinterpret_cast<float*>(tile.documents.for_scores.data()));
    return;
  }
  const bool scores_follow = !for_gradient || (!second && (!kept_ || sizes_.hold));
  if (scores_follow) pack_lane_pairs(rows, tile.padded, tile.documents.for_scores.data());
  if (for_gradient && of_queries_) pack_row_pairs(rows, tile.padded / 2, tile.documents.pairs_for_queries.data());
}

// Sums of q . d, for which the positives' own columns and the padding are taken out at once.
void GroupRun::raw_scores(const Tile& tile, const Blocks& blocks, float* scores) const {
  const int64_t block_lanes = kernels_.pairs ? LANES / 2 : LANES;
  const int64_t steps = kernels_.pairs ? (problem_.width + 1) / 2 : problem_.width;  // of the summed axis
  for (int64_t done = 0; done < steps; done += STEP_BLOCKS * block_lanes)
    for (int64_t block = 0; block < blocks.count; ++block)
      kernels_.product_rows({tile.count, std::min(STEP_BLOCKS * block_lanes, steps - done),
                             &tile.documents.for_scores[done * tile.padded], tile.padded * block_lanes,
                             &transposed_[((blocks.first + block) * steps + done) * LANES],
                             scores + block * tile.padded * LANES, LANES, done > 0});
  for (int64_t block = 0; block < blocks.count && tile.padded > tile.count; ++block)
    std::fill_n(scores + (block * tile.padded + tile.count) * LANES, LANES, LOWEST);
  const int64_t lane = blocks.first * LANES;
  for (int64_t i = 0; i < std::min(rows_ - lane, blocks.count * LANES); ++i) {
    const int64_t column = place_[lane + i] - tile.first;
    if (column >= 0 && column < tile.count) scores[(i / LANES * tile.padded + column) * LANES + i % LANES] = LOWEST;
  }
}

void GroupRun::finish(const Tile& tile, const Blocks& blocks, Scratch& scratch, float* scores, float* highest) const {
  TileMask mask{};
  const int64_t lane = blocks.first * LANES;
  float* log_weights = scratch.column_floats.data();
  for (int64_t c = 0; c < tile.padded && (problem_.log_weights || !call_.ids.columns.empty()); ++c) {
    const int64_t column = group_.columns.member(tile.first + std::min(c, tile.count - 1));
    if (problem_.log_weights) log_weights[c] = problem_.log_weights[column];
    if (!call_.ids.columns.empty()) scratch.column_ids[c] = call_.ids.columns[column];
  }
  if (problem_.log_weights) mask.log_weights = log_weights;
  if (!call_.ids.columns.empty()) mask.column_ids = scratch.column_ids.data();
  if (!call_.ids.positives.empty()) mask.positive_ids = positive_ids_.data() + lane;
  if (!call_.ids.known.empty()) mask.known_ids = known_ids_.data() + lane, mask.known = int(problem_.known);
  mask.known_lanes = lanes_;
  if (problem_.has_margin) mask.limits = limits_.data() + lane;
  kernels_.finish_scores(scores, blocks.count, tile.padded, 1.0f / problem_.temperature, mask, highest);
}

void GroupRun::statistics_of_strip(int64_t strip, Scratch& scratch) {
  float *best = &strip_highest_[strip * lanes_], *sums = &strip_sums_[strip * lanes_];
  std::fill_n(best, lanes_, LOWEST);
  std::fill_n(sums, lanes_, 0.0f);
  for (int64_t number = strip_start(strip); number < strip_start(strip + 1); ++number) {
    const Tile tile = tile_at(number, scratch.thread);
    float* scores = kept_ ? kept_ + number * sizes_.tile_columns * lanes_ : scratch.scores.data();
    float* highest = kept_ ? kept_highest_ + number * lanes_ : scratch.factors.data();
    pack_documents(tile, false);
    raw_scores(tile, {0, row_blocks_}, scores);
    finish(tile, {0, row_blocks_}, scratch, scores, highest);
    if (call_.column_negatives) merge_columns(tile, scratch, scores);
    kernels_.exponentials(scores, row_blocks_, tile.padded, highest, scratch.sums.data());
    kernels_.merge_statistics(best, sums, highest, scratch.sums.data(), lanes_);
  }
}

// Column statistics of a tile into those of the group. The tile's padded rows count for nothing.
void GroupRun::merge_columns(const Tile& tile, Scratch& scratch, const float* scores) {
  float* padding = const_cast<float*>(scores) + (row_blocks_ - 1) * tile.padded * LANES;
  for (int64_t c = 0; c < tile.padded; ++c)
    for (int64_t lane = rows_ - (row_blocks_ - 1) * LANES; lane < LANES; ++lane) padding[c * LANES + lane] = LOWEST;
  float *highest = scratch.column_floats.data() + tile.padded, *sums = highest + tile.padded;
  kernels_.column_statistics(scores, row_blocks_, tile.padded, highest, sums);
  for (int64_t c = 0; c < tile.count; ++c) {
    if (sums[c] == 0.0f) continue;
    float &best = column_highest_[tile.first + c], &sum = column_sums_[tile.first + c];
    const float top = std::max(best, highest[c]);
    sum = (sum == 0.0f ? 0.0f : sum * std::exp(best - top)) + sums[c] * std::exp(highest[c] - top);
    best = top;
  }
}

// Of rows first to last of the panel: their losses, and what the gradients ask of them.
void GroupRun::merge_strips(int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    float top = LOWEST, sum = 0.0f;
    for (int64_t strip = 0; strip < sizes_.strips; ++strip) top = std::max(top, strip_highest_[strip * lanes_ + i]);
    for (int64_t strip = 0; strip < sizes_.strips; ++strip)
      if (strip_sums_[strip * lanes_ + i] != 0.0f)
        sum += strip_sums_[strip * lanes_ + i] * std::exp(strip_highest_[strip * lanes_ + i] - top);
    const int64_t row = group_.rows.member(first_ + i);
    const double negatives = sum == 0.0f ? double(LOWEST) : top + std::log(double(sum));
    if (call_.row_negatives) call_.row_negatives[row] = negatives;
    if (!call_.losses) continue;
    const float lead = float(negatives - call_.positive_scores[row]);
    const float loss = std::max(lead, 0.0f) + std::log1p(std::exp(-std::fabs(lead)));
    call_.losses[row] = std::isnan(lead) ? lead : loss;
    if (!call_.row_weights) continue;
    const float factor = call_.row_weights[row] / problem_.temperature;
    const Total total(double(call_.positive_scores[row]) + loss);
    totals_[i] = total.rounded;
    factors_[i] = factor * total.gain;
    positive_factors_[i] = std::expm1(-loss) * factor;
  }
}

void GroupRun::end_columns() {
  for (int64_t c = 0; c < group_.columns.count; ++c)
    call_.column_negatives[group_.columns.member(c)] =
        column_sums_[c] == 0.0f ? double(LOWEST) : column_highest_[c] + std::log(double(column_sums_[c]));
}

Sizes sizes_of(const Group& group, const Call& call, int64_t workspace) {
  const int64_t columns = group.columns.count, rows = blocks_of(group.rows.count) * LANES;
  const int64_t width = blocks_of(call.problem.width) * LANES;
  const int64_t packed = 4 * columns * width;  // bytes of documents
  const bool keep = call.row_weights != nullptr, hold = packed <= HELD_BYTES;
  const auto fitted = [&](Sizes sizes, int64_t floats_a_row) {
    const int64_t fitting = workspace / (4 * floats_a_row) / LANES * LANES;
    sizes.panel_rows = std::min(sizes.panel_rows, std::max<int64_t>(fitting, LANES));
    return sizes;
  };
  const auto whole = [](int64_t count) { return (count + 3) / 4 * 4; };  // products take 12, 8 or 4 columns at a time
  const int64_t panel_rows = std::min(rows, MAX_PANEL_ROWS);
  const bool of_columns = call.column_negatives || (call.shares && call.shares->column_totals);
  const bool many_rows = group.rows.count > LANES || columns <= LANES;  // one block of them is one thread's
  const bool few_columns = columns <= BLOCKS_COLUMNS && packed <= BLOCKS_BYTES;
  if (many_rows && few_columns && !call.kernels.pairs && !of_columns)
    return fitted({panel_rows, whole(columns), 1, keep, hold, true}, whole(columns) + 2 * width);
  // Every strip but the first has its own sum of dQ: few columns a strip would cost more in sums than in products. A
  // power of two: three strips would take two threads as long as four.
  int64_t strips = columns > 24 ? 2 : 1;
  while (strips < MAX_STRIPS && columns > strips * STRIP_COLUMNS) strips *= 2;
  const int64_t even = (columns + strips - 1) / strips;
  const int64_t tiles = (even + MAX_TILE_COLUMNS - 1) / MAX_TILE_COLUMNS;  // of a strip: as many in each
  const int64_t tile = whole((even + tiles - 1) / tiles);
  strips = std::min(strips, (columns + tile - 1) / tile);
  const int64_t straight = straight_strips(group, call.problem.width);
  const int64_t parts = call.query_gradient || call.kept ? strips - straight : 0;
  return fitted({panel_rows, tile, strips, keep, hold, false}, (keep ? columns : 0) + tile + (parts + 2) * width);
}

int64_t kept_floats_of(const Group& group, const Sizes& sizes) {
  const int64_t tiles = (group.columns.count + sizes.tile_columns - 1) / sizes.tile_columns;
  return tiles * (sizes.tile_columns + 1) * sizes.panel_rows;
}

int64_t own_floats_of(const Group& group, const Sizes& sizes, int64_t width) {
  const int64_t parts = sizes.by_blocks ? 0 : sizes.strips, shares = sizes.by_blocks ? sizes.tile_columns : 0;
  return blocks_of(width) * LANES * (sizes.panel_rows * (parts + 2) + (sizes.hold ? group.columns.count : 0)) +
         sizes.panel_rows * shares;
}

void run_group(const Call& call, int32_t group, const Sizes& sizes, const Parallel& parallel, const Kept& kept) {
  GroupRun(call, group, sizes, parallel, kept).run();
}

}  // namespace tdro
