// Group ids in, the groups that have both rows and columns out. The order of the ids does not matter.
#pragma once

#include <cstdint>
#include <vector>

#include "infonce.h"

namespace tdro {

// Rows or columns of a group: neighbours from `first` on, or those that `index` names.
struct Span {
  int64_t first = 0, count = 0;
  const int64_t* index = nullptr;

  int64_t member(int64_t i) const { return index ? index[i] : first + i; }
};

struct Group {
  Span rows, columns;
};

struct Groups {
  std::vector<Group> groups;
  std::vector<int64_t> row_members, column_members;  // what the spans with an index point into
  std::vector<int32_t> group_of_row, group_of_column;  // -1 = in no group; empty = all in group 0
  std::vector<int32_t> place_of_column;                // within its group; empty = the column itself

  // Place of a column within a group's span, -1 when it is not in it.
  int64_t place(int64_t column, int32_t group) const {
    if (group_of_column.empty()) return column;
    return group_of_column[column] == group ? place_of_column[column] : -1;
  }
};

Groups find_groups(const Problem& problem);

// Ids as small numbers: equal ids, equal numbers. -2 = an id that no column has, and every -1 among the known ids.
struct Ids {
  std::vector<int32_t> columns, positives, known;  // [columns], [rows] or empty, [rows, known] or empty
};
Ids number_ids(const Problem& problem);

}  // namespace tdro
