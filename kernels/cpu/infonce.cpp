// The calls of infonce.h: groups, sizes and threads; panel.cpp does the work of a group.
#include "infonce.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "panel.h"

namespace tdro {
namespace {

constexpr int64_t SMALL_GROUP = 1 << 24;  // multiply-adds: below, whole groups are spread over the threads
constexpr int64_t TINY_GROUP = 1 << 20;   // below, other threads take longer to come than to help
constexpr int64_t SMALL_AT_ONCE = 16;     // by so many threads, of which the bits must not depend

const TileKernels& float_kernels() {
  for (const TileKernels* found : {kernels_avx512(), kernels_avx2()})
    if (found) return *found;
  return *kernels_generic();
}

const TileKernels& kernels_for(Type type) {
  static const TileKernels* pairs = kernels_avx512bf16();
  static const TileKernels& floats = float_kernels();
  return type == Type::bfloat16 && pairs ? *pairs : floats;
}

Parallel serial() {
  return {1, [](int64_t tasks, const std::function<void(int64_t, int)>& body) {
            for (int64_t task = 0; task < tasks; ++task) body(task, 0);
          }};
}

// Gradients of what is in no group, and of positives outside their row's group.
void add_positives_elsewhere(const Call& call, const float* positive_factors) {
  const Problem& problem = call.problem;
  const Rows documents{problem.documents, problem.type, problem.width, 0, problem.columns, nullptr};
  const Rows queries{problem.queries, problem.type, problem.width, 0, problem.rows, nullptr};
  std::vector<float> row(problem.width);
  for (int64_t i = 0; i < problem.rows; ++i) {
    const int64_t column = problem.positives[i];
    if (column < 0 || column >= problem.columns) continue;
    const int32_t group = call.groups.group_of_row[i];
    if (group >= 0 && call.groups.place(column, group) >= 0) continue;
    const float factor = positive_factors[i] / problem.temperature;
    const auto add = [&](const Rows& side, int64_t place, float* gradient) {
      call.kernels.add_scaled(gradient, wide_row(side, place, row.data()), factor, problem.width);
    };
    if (call.query_gradient) add(documents, column, call.query_gradient + i * problem.width);
    if (call.document_gradient) add(queries, i, call.document_gradient + column * problem.width);
  }
}

// What no group will write.
void clear_gradients(const Call& call) {
  const Problem& problem = call.problem;
  const size_t bytes = problem.width * sizeof(float);
  const bool none = call.groups.groups.empty();
  for (int64_t i = 0; call.query_gradient && i < problem.rows; ++i)
    if (none || (!call.groups.group_of_row.empty() && call.groups.group_of_row[i] < 0))
      std::memset(call.query_gradient + i * problem.width, 0, bytes);
  for (int64_t c = 0; call.document_gradient && c < problem.columns; ++c)
    if (none || (!call.groups.group_of_column.empty() && call.groups.group_of_column[c] < 0))
      std::memset(call.document_gradient + c * problem.width, 0, bytes);
}

// Where the exponentials of a call lie between its forward and its backward: the first panels of the first groups.
struct KeptRoom {
  float* memory = nullptr;
  int64_t floats = 0;

  Kept take(const Group& group, const Sizes& sizes) {
    const int64_t panel = kept_floats_of(group, sizes);
    const Kept taken{memory, std::min((group.rows.count + sizes.panel_rows - 1) / sizes.panel_rows, floats / panel)};
    memory += taken.panels * panel;
    floats -= taken.panels * panel;
    return taken;
  }
};

// Floats that a forward may keep, so that they and the memory of its backward fit the workspace.
int64_t floats_to_keep(const Call& call) {
  int64_t wanted = 0, own = 0;
  for (const Group& group : call.groups.groups) {
    const Sizes sizes = sizes_of(group, call, call.problem.workspace);
    wanted += (group.rows.count + sizes.panel_rows - 1) / sizes.panel_rows * kept_floats_of(group, sizes);
    own = std::max(own, own_floats_of(group, sizes, call.problem.width));
  }
  return std::clamp<int64_t>(call.problem.workspace / 4 - own, 0, wanted);
}

void run_groups(const Call& call, const Parallel& parallel, KeptRoom room = {}) {
  const Problem& problem = call.problem;
  const int64_t workspace = problem.workspace;
  struct Small {
    int32_t group;
    Sizes sizes;
    Kept kept;
  };
  std::vector<Small> small;
  const Parallel one = serial();
  for (int32_t g = 0; g < int32_t(call.groups.groups.size()); ++g) {
    const Group& group = call.groups.groups[g];
    const int64_t work = group.rows.count * group.columns.count * problem.width;
    const bool alone = call.groups.groups.size() == 1 || work >= SMALL_GROUP;
    const Sizes sizes = sizes_of(group, call, alone ? workspace : workspace / SMALL_AT_ONCE);
    const Kept kept = room.take(group, sizes);
    if (alone)
      run_group(call, g, sizes, work < TINY_GROUP ? one : parallel, kept);
    else
      small.push_back({g, sizes, kept});
  }
  const int64_t batch = std::max<int64_t>(1, int64_t(small.size()) / (8 * parallel.threads));
  parallel.run((int64_t(small.size()) + batch - 1) / batch, [&](int64_t task, int) {
    for (size_t i = task * batch; i < std::min<size_t>(small.size(), (task + 1) * batch); ++i)
      run_group(call, small[i].group, small[i].sizes, one, small[i].kept);
  });
}

}  // namespace

const char* cpu_path() { return kernels_avx512bf16() ? kernels_avx512bf16()->name : float_kernels().name; }

void positive_scores(const Problem& problem, const Parallel& parallel, float* scores) {
  const Rows queries{problem.queries, problem.type, problem.width, 0, problem.rows, nullptr};
  const Rows documents{problem.documents, problem.type, problem.width, 0, problem.columns, nullptr};
  constexpr int64_t BATCH = 64;
  parallel.run((problem.rows + BATCH - 1) / BATCH, [&](int64_t task, int) {
    std::vector<float> room(problem.type == Type::float32 ? 0 : 2 * problem.width);
    float* const other = room.data() + room.size() / 2;
    for (int64_t i = task * BATCH; i < std::min(problem.rows, (task + 1) * BATCH); ++i) {
      const int64_t column = problem.positives[i];
      scores[i] = 0.0f;
      if (column < 0 || column >= problem.columns) continue;
      const float *query = wide_row(queries, i, room.data()), *document = wide_row(documents, column, other);
      scores[i] = kernels_for(problem.type).dot(query, document, problem.width) / problem.temperature;
    }
  });
}

void forward(const Problem& problem, const Parallel& parallel, const float* positive_scores, double* row_negatives,
             double* column_negatives) {
  constexpr double LOWEST = -std::numeric_limits<double>::infinity();
  std::fill_n(row_negatives, problem.rows, LOWEST);
  if (column_negatives) std::fill_n(column_negatives, problem.columns, LOWEST);
  const Groups groups = find_groups(problem);
  const Ids ids = number_ids(problem);
  Call call{problem, kernels_for(problem.type), groups, ids, positive_scores};
  call.row_negatives = row_negatives;
  call.column_negatives = column_negatives;
  run_groups(call, parallel);
}

void backward(const Problem& problem, const Parallel& parallel, const Shares& shares, float* query_gradient,
              float* document_gradient) {
  const Groups groups = find_groups(problem);
  const Ids ids = number_ids(problem);
  Call call{problem, kernels_for(problem.type), groups, ids, shares.positive_scores};
  call.shares = &shares;
  call.query_gradient = query_gradient;
  call.document_gradient = document_gradient;
  clear_gradients(call);
  run_groups(call, parallel);
  if (problem.query_group) add_positives_elsewhere(call, shares.positive_factors);
}

void losses(const Problem& problem, const Parallel& parallel, const float* positive_scores, float* losses,
            const RoomFor& room_for) {
  std::fill_n(losses, problem.rows, 0.0f);  // of a row without columns
  const Groups groups = find_groups(problem);
  const Ids ids = number_ids(problem);
  Call call{problem, kernels_for(problem.type), groups, ids, positive_scores};
  call.losses = losses;
  call.kept = bool(room_for);
  KeptRoom room;
  if (room_for) room.floats = floats_to_keep(call), room.memory = room_for(room.floats);
  run_groups(call, parallel, room);
}

void losses_backward(const Problem& problem, const Parallel& parallel, const float* positive_scores,
                     const float* losses, const float* row_weights, const float* kept, int64_t kept_floats,
                     float* query_gradient, float* document_gradient) {
  Buffer<float> totals(problem.rows), factors(problem.rows), positive_factors(problem.rows);
  for (int64_t i = 0; i < problem.rows; ++i) {
    const Total total(double(positive_scores[i]) + losses[i]);
    totals[i] = total.rounded;
    factors[i] = row_weights[i] * total.gain;
    positive_factors[i] = std::expm1(-losses[i]) * row_weights[i];
  }
  const Shares shares{positive_scores, totals.data(), factors.data(), positive_factors.data(), nullptr, nullptr};
  const Groups groups = find_groups(problem);
  const Ids ids = number_ids(problem);
  Call call{problem, kernels_for(problem.type), groups, ids, positive_scores};
  call.shares = &shares;
  call.kept = kept_floats > 0;
  call.all_columns = true;
  call.query_gradient = query_gradient;
  call.document_gradient = document_gradient;
  clear_gradients(call);
  run_groups(call, parallel, {const_cast<float*>(kept), kept_floats});  // which is only read
  if (problem.query_group) add_positives_elsewhere(call, positive_factors.data());
}

void forward_backward(const Problem& problem, const Parallel& parallel, const float* positive_scores,
                      const float* row_weights, float* losses, float* query_gradient, float* document_gradient) {
  const Groups groups = find_groups(problem);
  int64_t most = 0;  // columns of a group
  for (const Group& group : groups.groups) most = std::max(most, group.columns.count);
  if (most * LANES * int64_t(sizeof(float)) > problem.workspace) {  // no panel of exponentials fits
    tdro::losses(problem, parallel, positive_scores, losses, RoomFor());
    losses_backward(problem, parallel, positive_scores, losses, row_weights, nullptr, 0, query_gradient,
                    document_gradient);
    return;
  }
  std::fill_n(losses, problem.rows, 0.0f);  // of a row without columns
  const Ids ids = number_ids(problem);
  Call call{problem, kernels_for(problem.type), groups, ids, positive_scores};
  call.query_gradient = query_gradient;
  call.document_gradient = document_gradient;
  call.row_weights = row_weights;
  call.losses = losses;
  call.all_columns = true;
  clear_gradients(call);
  run_groups(call, parallel);
  if (!problem.query_group) return;
  std::vector<float> factors(problem.rows);
  for (int64_t i = 0; i < problem.rows; ++i) factors[i] = std::expm1(-losses[i]) * row_weights[i];
  add_positives_elsewhere(call, factors.data());
}

}  // namespace tdro
