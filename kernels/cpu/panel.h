// One group's rows against its columns: a panel of rows at a time, the columns in strips of tiles, or few of them by
// blocks.
//
// What is fixed by the shape alone: the panels, the tiles, the strips, and the order in which their parts are added. So
// the bits of the results do not depend on the number of threads.
#pragma once

#include <cmath>

#include "buffer.h"
#include "groups.h"
#include "infonce.h"
#include "pack.h"
#include "tile.h"

namespace tdro {

// What one call of the library works on.
struct Call {
  const Problem& problem;
  const TileKernels& kernels;
  const Groups& groups;
  const Ids& ids;
  const float* positive_scores;  // [rows], scaled
  // forward
  double* row_negatives = nullptr;     // [rows]
  double* column_negatives = nullptr;  // [columns] or null
  // backward
  const Shares* shares = nullptr;
  bool kept = false;  // or to be kept: exponentials for another call, whose panels are the same
  bool all_columns = false;  // of each row are among these, so that its shares add up to 0
  float* query_gradient = nullptr;     // [rows, width] or null
  float* document_gradient = nullptr;  // [columns, width] or null
  // forward and backward in one
  const float* row_weights = nullptr;  // [rows]
  float* losses = nullptr;             // [rows]; also of a forward whose weights come later
};

// A logsumexp that is subtracted from scores. One of 500 is a float in steps of 3e-5, and so would be the sum of a row's
// shares: the factors take up what is left of it.
struct Total {
  explicit Total(double sum) : rounded(float(sum)), gain(float(std::exp(double(rounded) - sum))) {}
  float rounded, gain;
};

// Room for the exponentials of a group that its forward keeps for its backward: those of its first panels.
struct Kept {
  float* memory = nullptr;
  int64_t panels = 0;
};

struct Sizes {
  int64_t panel_rows, tile_columns, strips;
  bool keep;  // the panel's exponentials, so that the gradients need no second product of the scores
  bool hold;  // all documents packed, so that they are packed once
  bool by_blocks;  // one tile and one strip: the work is shared out by blocks of rows, then by blocks of dimensions
};

// Sizes for a group, with as many rows a panel as fit into `workspace` bytes. A forward that keeps exponentials for a
// backward has the sizes of that.
Sizes sizes_of(const Group& group, const Call& call, int64_t workspace);

// Floats that the exponentials of a panel of a group take, and those of the memory that its gradients take meanwhile.
int64_t kept_floats_of(const Group& group, const Sizes& sizes);
int64_t own_floats_of(const Group& group, const Sizes& sizes, int64_t width);

// Everything that a call asks of one group. Threads have been counted in `parallel`.
void run_group(const Call& call, int32_t group, const Sizes& sizes, const Parallel& parallel, const Kept& kept);

}  // namespace tdro
