// Tile work for any processor, in the registers that every one of its kind has.
#define TDRO_VECTOR_BYTES 16
#define TDRO_ROWS 4
#include "tile_body.h"

namespace tdro {

const TileKernels* kernels_generic() {
  static const TileKernels kernels = {
      "generic", false, product<32, 1>, product<1, 32>, finish_scores, exponentials, column_statistics,
      merge_statistics, row_scales, shares,
      scale_rows, take_rows, add_lanes, add_scaled, dot, nullptr, nullptr, nullptr, nullptr};
  return &kernels;
}

}  // namespace tdro
