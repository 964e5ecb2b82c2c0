// What the blocks of the kernels for the positives do: one dot product, or one row of a gradient, a block.
#pragma once
#include "bodies.h"

namespace tdro_tiles {

template <class Storage>
TDRO_DEVICE float embedding(const void* side, int64_t place) {
  return widen(static_cast<const Storage*>(side)[place]);
}

TDRO_DEVICE bool is_column(const TdroPositives& sides, int64_t column) { return column >= 0 && column < sides.columns; }

template <class Storage>
struct PositiveScores {
  static constexpr int kShared = kThreads;
  TdroPositives sides;
  const float* temperature;
  float* scores;

  template <class Block>
  TDRO_DEVICE void operator()(Block& block) const {
    const int64_t column = sides.positives[block.index], width = sides.width;
    const bool inside = is_column(sides, column);
    block.each([&](int thread) {
      float sum = 0.0f;
      for (int64_t k = thread; inside && k < width; k += kThreads)
        sum += embedding<Storage>(sides.queries, block.index * width + k) *
               embedding<Storage>(sides.documents, column * width + k);
      block.shared[thread].sum = sum;
    });
    for (int half = kThreads / 2; half > 0; half /= 2) {
      block.barrier();
      block.each([&](int thread) {
        if (thread < half) block.shared[thread].sum += block.shared[thread + half].sum;
      });
    }
    block.each([&](int thread) {
      if (thread == 0) scores[block.index] = inside ? block.shared[0].sum * (1.0f / *temperature) : NAN;
    });
  }
};

template <class Storage>
struct AddToQueries {
  static constexpr int kShared = 1;
  TdroPositives sides;
  const float* factors;
  float* gradient;

  template <class Block>
  TDRO_DEVICE void operator()(Block& block) const {
    const int64_t column = sides.positives[block.index], width = sides.width;
    if (!is_column(sides, column)) return;
    const float factor = factors[block.index];
    block.each([&](int thread) {
      for (int64_t k = thread; k < width; k += kThreads)
        gradient[block.index * width + k] += factor * embedding<Storage>(sides.documents, column * width + k);
    });
  }
};

// The block of the first row of each positive, in the order, sums all rows of that positive: no two write one place.
template <class Storage>
struct AddToDocuments {
  static constexpr int kShared = 1;
  TdroPositives sides;
  const float* factors;
  const int64_t* order;
  float* gradient;

  template <class Block>
  TDRO_DEVICE void operator()(Block& block) const {
    const int64_t first = block.index, width = sides.width;
    const int64_t column = sides.positives[order[first]];
    if (!is_column(sides, column) || (first > 0 && sides.positives[order[first - 1]] == column)) return;
    block.each([&](int thread) {
      for (int64_t k = thread; k < width; k += kThreads) {
        float sum = 0.0f;
        for (int64_t place = first; place < sides.rows && sides.positives[order[place]] == column; ++place)
          sum += factors[order[place]] * embedding<Storage>(sides.queries, order[place] * width + k);
        gradient[column * width + k] += sum;
      }
    });
  }
};

}  // namespace tdro_tiles
