// Tile work in 256-bit registers: x86-64 processors since 2013.
#define TDRO_VECTOR_BYTES 32
#define TDRO_ROWS 4
#include "tile_body.h"

namespace tdro {

const TileKernels* kernels_avx2() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return nullptr;
  static const TileKernels kernels = {
      "avx2", false, product<32, 1>, product<1, 32>, finish_scores, exponentials, column_statistics,
      merge_statistics, row_scales, shares,
      scale_rows, take_rows, add_lanes, add_scaled, dot, nullptr, nullptr, nullptr, nullptr};
  return &kernels;
}

}  // namespace tdro
