#include "groups.h"

namespace tdro {
namespace {

// Open addressing from 64-bit ids to 32-bit numbers.
class Numbers {
 public:
  explicit Numbers(int64_t expected) {
    size_t size = 16;
    while (int64_t(size) < 2 * expected) size *= 2;
    keys_.resize(size);
    values_.assign(size, -1);
  }

  // The number of an id, given in the order of first appearance.
  int32_t add(int64_t id) {
    const size_t slot = find(id);
    if (values_[slot] < 0) {
      keys_[slot] = id;
      values_[slot] = next_++;
    }
    return values_[slot];
  }

  // -2 for an id that was never added.
  int32_t look_up(int64_t id) const {
    const int32_t value = values_[find(id)];
    return value < 0 ? -2 : value;
  }

 private:
  size_t find(int64_t id) const {
    const size_t mask = keys_.size() - 1;
    size_t slot = (uint64_t(id) * 0x9e3779b97f4a7c15u >> 20) & mask;
    while (values_[slot] >= 0 && keys_[slot] != id) slot = (slot + 1) & mask;
    return slot;
  }

  std::vector<int64_t> keys_;
  std::vector<int32_t> values_;
  int32_t next_ = 0;
};

// Members of each group in rising order: a span of neighbours where they are, else a list.
void spans_of(const std::vector<int32_t>& group_of, size_t num_groups, std::vector<int64_t>& members,
              std::vector<Span>& spans) {
  spans.assign(num_groups, Span{});
  std::vector<int64_t> last(num_groups, -1);
  for (int64_t i = 0; i < int64_t(group_of.size()); ++i) {
    if (group_of[i] < 0) continue;
    Span& span = spans[group_of[i]];
    if (span.count++ == 0) span.first = i;
    last[group_of[i]] = i;
  }
  std::vector<int64_t> start(num_groups, -1);
  int64_t listed = 0;
  for (size_t g = 0; g < num_groups; ++g)
    if (spans[g].count && last[g] - spans[g].first + 1 != spans[g].count) {
      start[g] = listed;
      listed += spans[g].count;
    }
  if (listed == 0) return;
  members.resize(listed);
  std::vector<int64_t> next = start;
  for (int64_t i = 0; i < int64_t(group_of.size()); ++i)
    if (group_of[i] >= 0 && start[group_of[i]] >= 0) members[next[group_of[i]]++] = i;
  for (size_t g = 0; g < num_groups; ++g)
    if (start[g] >= 0) spans[g].index = members.data() + start[g];
}

}  // namespace

Groups find_groups(const Problem& problem) {
  Groups found;
  if (!problem.query_group) {
    if (problem.rows && problem.columns) found.groups.push_back({{0, problem.rows}, {0, problem.columns}});
    return found;
  }
  Numbers numbers(problem.rows);
  found.group_of_row.resize(problem.rows);
  int32_t num_groups = 0;
  for (int64_t row = 0; row < problem.rows; ++row) {
    found.group_of_row[row] = numbers.add(problem.query_group[row]);
    if (found.group_of_row[row] >= num_groups) num_groups = found.group_of_row[row] + 1;
  }
  found.group_of_column.resize(problem.columns);
  found.place_of_column.resize(problem.columns);
  std::vector<int32_t> sizes(num_groups, 0);
  for (int64_t column = 0; column < problem.columns; ++column) {
    const int32_t group = numbers.look_up(problem.document_group[column]);
    found.group_of_column[column] = group < 0 ? -1 : group;
    if (group >= 0) found.place_of_column[column] = sizes[group]++;
  }
  std::vector<Span> rows, columns;
  spans_of(found.group_of_row, num_groups, found.row_members, rows);
  spans_of(found.group_of_column, num_groups, found.column_members, columns);
  std::vector<int32_t> renumbered(num_groups, -1);  // groups without columns are left out
  for (int32_t g = 0; g < num_groups; ++g)
    if (columns[g].count) {
      renumbered[g] = int32_t(found.groups.size());
      found.groups.push_back({rows[g], columns[g]});
    }
  for (int32_t& group : found.group_of_row) group = renumbered[group];
  for (int32_t& group : found.group_of_column) group = group < 0 ? -1 : renumbered[group];
  return found;
}

Ids number_ids(const Problem& problem) {
  Ids ids;
  if (!problem.column_ids || (!problem.positive_ids && !problem.known_ids)) return ids;
  Numbers numbers(problem.columns);
  ids.columns.resize(problem.columns);
  for (int64_t column = 0; column < problem.columns; ++column)
    ids.columns[column] = numbers.add(problem.column_ids[column]);
  if (problem.positive_ids) {
    ids.positives.resize(problem.rows);
    for (int64_t row = 0; row < problem.rows; ++row) ids.positives[row] = numbers.look_up(problem.positive_ids[row]);
  }
  if (problem.known_ids) {
    ids.known.resize(problem.rows * problem.known);
    for (int64_t i = 0; i < problem.rows * problem.known; ++i)
      ids.known[i] = problem.known_ids[i] == -1 ? -2 : numbers.look_up(problem.known_ids[i]);
  }
  return ids;
}

}  // namespace tdro
