// The body of every instruction set's tile work, in the compiler's vector types. Included once by each tile_*.cpp with
// TDRO_VECTOR_BYTES (width of a register) and TDRO_ROWS (rows of C kept in registers) set.
#include <cmath>
#include <cstring>
#include <limits>

#include "tile.h"

namespace tdro {
namespace {

typedef float Vector __attribute__((vector_size(TDRO_VECTOR_BYTES)));
typedef int32_t Integers __attribute__((vector_size(TDRO_VECTOR_BYTES)));
typedef float Loose __attribute__((vector_size(TDRO_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t LooseIntegers __attribute__((vector_size(TDRO_VECTOR_BYTES), aligned(4), may_alias));

constexpr int WIDTH = TDRO_VECTOR_BYTES / 4;
constexpr int VECTORS = LANES / WIDTH;                   // of one block
constexpr int HELD = VECTORS < 2 ? 1 : 2;                // of one block at a time in registers
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

inline Vector load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline Integers load(const int32_t* p) { return *reinterpret_cast<const LooseIntegers*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Loose*>(p) = v; }
inline Vector all(float x) { return x - Vector{}; }
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// e^x to 2 units in the last place for x <= 88; 0 below -87; NaN stays NaN. Minimax polynomial on [-ln2/2, ln2/2].
inline Vector exponential(Vector x) {
  const Vector bounded = x > all(88.0f) ? all(88.0f) : x;
  const Vector shifted = bounded * 1.44269504f + 12582912.0f;  // rounds to the nearest integer in the low bits
  const Vector power = shifted - 12582912.0f;
  const Vector rest = (bounded - power * 0.693359375f) + power * 2.12194440e-4f;
  Vector series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  const Vector value = series * rest * rest + rest + 1.0f;
  const Integers exponent = reinterpret_cast<Integers>(shifted) << 23;
  const Vector scaled = reinterpret_cast<Vector>(reinterpret_cast<Integers>(value) + exponent);
  return x < all(-87.0f) ? Vector{} : scaled;
}

// C[ROWS][HELD vectors] of one product; A_ROW and A_STEP are the strides of A.
template <int ROWS, int A_ROW, int A_STEP>
inline void product_part(int64_t k, const float* a, int64_t a_block, const float* b, float* c, int64_t c_row,
                         bool add) {
  Vector sums[ROWS][HELD];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < HELD; ++v) sums[row][v] = add ? load(c + row * c_row + v * WIDTH) : Vector{};
  while (k > 0) {
    const int64_t steps = A_STEP == 1 && k > LANES ? LANES : k;
    const float* column = a;
    for (int64_t step = 0; step < steps; ++step, column += A_STEP, b += LANES) {
      Vector right[HELD];
#pragma GCC unroll 2
      for (int v = 0; v < HELD; ++v) right[v] = load(b + v * WIDTH);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        const Vector left = all(column[row * A_ROW]);
#pragma GCC unroll 2
        for (int v = 0; v < HELD; ++v) sums[row][v] += left * right[v];
      }
    }
    k -= steps;
    a += a_block;
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < HELD; ++v) store(c + row * c_row + v * WIDTH, sums[row][v]);
}

template <int ROWS, int A_ROW, int A_STEP>
inline int64_t product_rows_of(const Product& p, int64_t row) {
  const float* a = static_cast<const float*>(p.a) + row * A_ROW;
  for (; row + ROWS <= p.m; row += ROWS, a += ROWS * A_ROW)
    for (int first = 0; first < LANES; first += HELD * WIDTH)
      product_part<ROWS, A_ROW, A_STEP>(p.k, a, p.a_block, static_cast<const float*>(p.b) + first,
                                        p.c + row * p.c_row + first, p.c_row, p.add);
  return row;
}

template <int A_ROW, int A_STEP>
void product(const Product& p) {
  int64_t row = product_rows_of<TDRO_ROWS, A_ROW, A_STEP>(p, 0);
  if (TDRO_ROWS > 8) row = product_rows_of<8, A_ROW, A_STEP>(p, row);
  if (TDRO_ROWS > 4) row = product_rows_of<4, A_ROW, A_STEP>(p, row);
  row = product_rows_of<2, A_ROW, A_STEP>(p, row);
  product_rows_of<1, A_ROW, A_STEP>(p, row);
}

inline Vector without(Vector score, Integers out) { return out ? all(LOWEST) : score; }

void finish_scores(float* scores, int64_t row_blocks, int64_t columns, float scale, const TileMask& mask,
                   float* highest) {
  for (int64_t block = 0; block < row_blocks; ++block) {
    for (int first = 0; first < LANES; first += WIDTH) {
      const int64_t lane = block * LANES + first;
      float* tile = scores + block * columns * LANES + first;
      Vector best = all(LOWEST);
      for (int64_t column = 0; column < columns; ++column, tile += LANES) {
        Vector score = load(tile) * scale;
        if (mask.limits) score = without(score, score > load(mask.limits + lane));
        if (mask.column_ids) {
          const Integers id = mask.column_ids[column] - Integers{};
          if (mask.positive_ids) score = without(score, id == load(mask.positive_ids + lane));
          for (int known = 0; known < mask.known; ++known)
            score = without(score, id == load(mask.known_ids + known * mask.known_lanes + lane));
        }
        if (mask.log_weights) score += mask.log_weights[column];
        best = larger(score, best);
        store(tile, score);
      }
      store(highest + lane, best);
    }
  }
}

void exponentials(float* scores, int64_t row_blocks, int64_t columns, const float* highest, float* sums) {
  for (int64_t block = 0; block < row_blocks; ++block)
    for (int first = 0; first < LANES; first += WIDTH) {
      const int64_t lane = block * LANES + first;
      const Vector top = load(highest + lane);
      const Vector shift = top == all(LOWEST) ? Vector{} : top;  // -inf minus -inf would be NaN
      float* tile = scores + block * columns * LANES + first;
      Vector sum{};
      for (int64_t column = 0; column < columns; ++column, tile += LANES) {
        const Vector value = exponential(load(tile) - shift);
        sum += value;
        store(tile, value);
      }
      store(sums + lane, sum);
    }
}

void merge_statistics(float* highest, float* sums, const float* tile_highest, const float* tile_sums, int64_t lanes) {
  for (int64_t lane = 0; lane < lanes; lane += WIDTH) {
    const Vector before = load(highest + lane), now = load(tile_highest + lane), top = larger(before, now);
    const Vector shift = top == all(LOWEST) ? Vector{} : top;
    const Vector earlier = load(sums + lane) * exponential(before - shift);
    store(sums + lane, earlier + load(tile_sums + lane) * exponential(now - shift));
    store(highest + lane, top);
  }
}

void row_scales(const float* highest, const float* totals, const float* factors, float* out, int64_t lanes) {
  for (int64_t lane = 0; lane < lanes; lane += WIDTH) {
    const Vector top = load(highest + lane), value = load(factors + lane) * exponential(top - load(totals + lane));
    store(out + lane, top == all(LOWEST) ? Vector{} : value);
  }
}

void column_statistics(const float* scores, int64_t row_blocks, int64_t columns, float* highest, float* sums) {
  for (int64_t column = 0; column < columns; ++column) {
    const float* start = scores + column * LANES;
    Vector best = all(LOWEST);
    for (int64_t block = 0; block < row_blocks; ++block)
      for (int v = 0; v < VECTORS; ++v) best = larger(load(start + block * columns * LANES + v * WIDTH), best);
    float top = LOWEST;
    for (int lane = 0; lane < WIDTH; ++lane) top = best[lane] > top ? best[lane] : top;
    const Vector shift = all(top == LOWEST ? 0.0f : top);
    Vector sum{};
    for (int64_t block = 0; block < row_blocks; ++block)
      for (int v = 0; v < VECTORS; ++v)
        sum += exponential(load(start + block * columns * LANES + v * WIDTH) - shift);
    highest[column] = top;
    sums[column] = 0.0f;
    for (int lane = 0; lane < WIDTH; ++lane) sums[column] += sum[lane];
  }
}

void shares(float* scores, int64_t row_blocks, int64_t columns, const float* totals, const float* factors,
            const float* column_totals, const float* column_factors) {
  for (int64_t block = 0; block < row_blocks; ++block)
    for (int first = 0; first < LANES; first += WIDTH) {
      const int64_t lane = block * LANES + first;
      const Vector total = load(totals + lane), factor = load(factors + lane);
      float* tile = scores + block * columns * LANES + first;
      for (int64_t column = 0; column < columns; ++column, tile += LANES) {
        const Vector score = load(tile);
        Vector share = factor * exponential(score - total);
        if (column_totals) share += column_factors[column] * exponential(score - column_totals[column]);
        store(tile, share);
      }
    }
}

void scale_rows(const float* values, float* out, int64_t row_blocks, int64_t columns, const float* factors) {
  for (int64_t block = 0; block < row_blocks; ++block) {
    Vector factor[VECTORS];
    for (int v = 0; v < VECTORS; ++v) factor[v] = load(factors + block * LANES + v * WIDTH);
    for (int64_t column = 0; column < columns; ++column, values += LANES, out += LANES)
      for (int v = 0; v < VECTORS; ++v) store(out + v * WIDTH, load(values + v * WIDTH) * factor[v]);
  }
}

void take_rows(const float* values, int64_t row_blocks, int64_t columns, float* rest) {
  for (int64_t block = 0; block < row_blocks; ++block)
    for (int first = 0; first < LANES; first += WIDTH) {
      const float* tile = values + block * columns * LANES + first;
      Vector sum{};
      for (int64_t column = 0; column < columns; ++column, tile += LANES) sum += load(tile);
      float* const to = rest + block * LANES + first;
      store(to, load(to) - sum);
    }
}

void add_lanes(float* target, const float* source, int64_t lanes, bool add) {
  if (lanes == LANES) {
    for (int v = 0; v < VECTORS; ++v) {
      const Vector value = load(source + v * WIDTH);
      store(target + v * WIDTH, add ? load(target + v * WIDTH) + value : value);
    }
    return;
  }
  for (int64_t lane = 0; lane < lanes; ++lane) target[lane] = add ? target[lane] + source[lane] : source[lane];
}

void add_scaled(float* target, const float* source, float factor, int64_t width) {
  int64_t k = 0;
  for (; k + WIDTH <= width; k += WIDTH) store(target + k, load(target + k) + load(source + k) * factor);
  for (; k < width; ++k) target[k] += source[k] * factor;
}

float dot(const float* a, const float* b, int64_t width) {
  Vector sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * WIDTH <= width; k += 4 * WIDTH)
    for (int v = 0; v < 4; ++v) sums[v] += load(a + k + v * WIDTH) * load(b + k + v * WIDTH);
  const Vector sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0.0f;
  for (int lane = 0; lane < WIDTH; ++lane) total += sum[lane];
  for (; k < width; ++k) total += a[k] * b[k];
  return total;
}

}  // namespace
}  // namespace tdro
