// Tile work in 512-bit registers.
#define TDRO_VECTOR_BYTES 64
#define TDRO_ROWS 12
#include "tile_body.h"

namespace tdro {

const TileKernels* kernels_avx512() {
  for (const bool has : {bool(__builtin_cpu_supports("avx512f")), bool(__builtin_cpu_supports("avx512bw")),
                         bool(__builtin_cpu_supports("avx512dq")), bool(__builtin_cpu_supports("avx512vl"))})
    if (!has) return nullptr;
  static const TileKernels kernels = {
      "avx512", false, product<32, 1>, product<1, 32>, finish_scores, exponentials, column_statistics,
      merge_statistics, row_scales, shares,
      scale_rows, take_rows, add_lanes, add_scaled, dot, nullptr, nullptr, nullptr, nullptr};
  return &kernels;
}

}  // namespace tdro
