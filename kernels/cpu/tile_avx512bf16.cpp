// Tile work with products of bfloat16 pairs, summed in float32; everything else in 512-bit float32 registers.
#define TDRO_VECTOR_BYTES 64
#define TDRO_ROWS 12
#include <immintrin.h>

#include "tile_body.h"

namespace tdro {
namespace {

inline __m512bh pairs_at(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }

template <int ROWS, int A_ROW, int A_STEP>
inline void pair_product_part(int64_t k, const uint32_t* a, int64_t a_block, const uint32_t* b, float* c,
                              int64_t c_row, bool add) {
  __m512 sums[ROWS][2];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
    sums[row][0] = add ? _mm512_loadu_ps(c + row * c_row) : _mm512_setzero_ps();
    sums[row][1] = add ? _mm512_loadu_ps(c + row * c_row + 16) : _mm512_setzero_ps();
  }
  while (k > 0) {
    const int64_t steps = A_STEP == 1 && k > LANES / 2 ? LANES / 2 : k;
    const uint32_t* column = a;
    for (int64_t step = 0; step < steps; ++step, column += A_STEP, b += LANES) {
      const __m512bh right[2] = {pairs_at(b), pairs_at(b + 16)};
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        const __m512bh left = (__m512bh)_mm512_set1_epi32(int(column[row * A_ROW]));
        sums[row][0] = _mm512_dpbf16_ps(sums[row][0], left, right[0]);
        sums[row][1] = _mm512_dpbf16_ps(sums[row][1], left, right[1]);
      }
    }
    k -= steps;
    a += a_block;
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
    _mm512_storeu_ps(c + row * c_row, sums[row][0]);
    _mm512_storeu_ps(c + row * c_row + 16, sums[row][1]);
  }
}

template <int ROWS, int A_ROW, int A_STEP>
inline int64_t pair_product_rows_of(const Product& p, int64_t row) {
  const uint32_t* a = static_cast<const uint32_t*>(p.a) + row * A_ROW;
  for (; row + ROWS <= p.m; row += ROWS, a += ROWS * A_ROW)
    pair_product_part<ROWS, A_ROW, A_STEP>(p.k, a, p.a_block, static_cast<const uint32_t*>(p.b), p.c + row * p.c_row,
                                           p.c_row, p.add);
  return row;
}

template <int A_ROW, int A_STEP>
void pair_product(const Product& p) {
  int64_t row = pair_product_rows_of<12, A_ROW, A_STEP>(p, 0);
  row = pair_product_rows_of<8, A_ROW, A_STEP>(p, row);
  row = pair_product_rows_of<4, A_ROW, A_STEP>(p, row);
  row = pair_product_rows_of<2, A_ROW, A_STEP>(p, row);
  pair_product_rows_of<1, A_ROW, A_STEP>(p, row);
}

typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(4), may_alias));

// The upper or the lower halves of 32-bit lanes as floats.
inline __m512 half_of(__m512i pairs, bool upper) {
  const Bits bits = reinterpret_cast<Bits>(pairs);
  return reinterpret_cast<__m512>(upper ? bits & 0xffff0000u : bits << 16);
}

// 16 neighbouring numbers as floats.
inline __m512 floats_at(const uint32_t* pairs) {
  const Halves halves = *reinterpret_cast<const Halves*>(pairs);
  return half_of(reinterpret_cast<__m512i>(__builtin_convertvector(halves, Bits)), false);
}

void pair_means(const uint32_t* pairs, int64_t rows, float* mean) {
  for (int half = 0; half < LANES; half += 16) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < (rows + 1) / 2; ++i) {
      const __m512i pair = _mm512_loadu_si512(pairs + i * LANES + half);
      sum += half_of(pair, false) + half_of(pair, true);
    }
    _mm512_storeu_ps(mean + half, sum / float(rows));
  }
}

void lane_pairs(const float* in, uint32_t* out, int64_t row_blocks, int64_t columns, float* lost) {
  for (int64_t column = 0; column < columns; ++column) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t block = 0; block < row_blocks; ++block) {
      const float* const from = in + (block * columns + column) * LANES;
      uint32_t* const to = out + (block * columns + column) * LANES / 2;
      const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + 16);
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      sum += (low - floats_at(to)) + (high - floats_at(to + 8));
    }
    lost[column] = 0.0f;
    for (int lane = 0; lane < 16; ++lane) lost[column] += sum[lane];
  }
}

void add_outer(float* c, int64_t c_row, int64_t columns, const float* factors, const float* row) {
  const __m512 low = _mm512_loadu_ps(row), high = _mm512_loadu_ps(row + 16);
  for (int64_t column = 0; column < columns; ++column, c += c_row) {
    const __m512 factor = _mm512_set1_ps(factors[column]);
    _mm512_storeu_ps(c, _mm512_fmadd_ps(factor, low, _mm512_loadu_ps(c)));
    _mm512_storeu_ps(c + 16, _mm512_fmadd_ps(factor, high, _mm512_loadu_ps(c + 16)));
  }
}

void row_pairs(const float* in, uint32_t* out, int64_t count, float* lost) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int half = 0; half < LANES; half += 16) {
    __m512 sum = _mm512_loadu_ps(lost + half);
    for (int64_t i = 0; i + 1 < count; i += 2) {
      const __m512 low = _mm512_loadu_ps(in + i * LANES + half), high = _mm512_loadu_ps(in + (i + 1) * LANES + half);
      const __m512i pair = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      sum += (low - half_of(pair, false)) + (high - half_of(pair, true));
      _mm512_storeu_si512(out + i / 2 * LANES + half, pair);
    }
    _mm512_storeu_ps(lost + half, sum);
  }
}

}  // namespace

const TileKernels* kernels_avx512bf16() {
  if (!kernels_avx512() || !__builtin_cpu_supports("avx512bf16")) return nullptr;
  static const TileKernels kernels = {
      "avx512+bf16", true, pair_product<16, 1>, pair_product<1, 32>, finish_scores, exponentials, column_statistics,
      merge_statistics, row_scales, shares, scale_rows, take_rows, add_lanes, add_scaled, dot, add_outer, pair_means,
      lane_pairs, row_pairs};
  return &kernels;
}

}  // namespace tdro
