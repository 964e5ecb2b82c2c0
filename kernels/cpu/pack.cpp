#include "pack.h"

#include <algorithm>
#include <cstring>

#include "tile.h"

namespace tdro {
namespace {

constexpr int64_t STEPS = 32;
constexpr int64_t SQUARE = 4;  // lanes and dimensions that are transposed in registers

typedef float Four __attribute__((vector_size(16)));
typedef float LooseFour __attribute__((vector_size(16), aligned(4), may_alias));

float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

float from_float16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent == 0) {
    const float small = float(fraction) * 0x1p-24f;
    return sign ? -small : small;
  }
  const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (fraction << 13);
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

const uint16_t* half_row(const Rows& rows, int64_t i) {
  return static_cast<const uint16_t*>(rows.data) + rows.row(i) * rows.width;
}

// SQUARE dimensions of as many rows, transposed.
void transpose(const float* const* lanes, int64_t k, float* out) {
  Four rows[SQUARE];
  for (int64_t lane = 0; lane < SQUARE; ++lane) rows[lane] = *reinterpret_cast<const LooseFour*>(lanes[lane] + k);
  for (int64_t i = 0; i < SQUARE; ++i)
    *reinterpret_cast<LooseFour*>(out + i * LANES) = Four{rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
}

struct Room {  // of converted rows
  Room(const Rows& rows, int64_t count) : data(rows.type == Type::float32 ? nullptr : new float[count * rows.width]) {}
  ~Room() { delete[] data; }
  float* data;
};

}  // namespace

const float* wide_row(const Rows& rows, int64_t i, float* room) {
  const int64_t start = rows.row(i) * rows.width;
  if (rows.type == Type::float32) return static_cast<const float*>(rows.data) + start;
  const uint16_t* half = static_cast<const uint16_t*>(rows.data) + start;
  if (rows.type == Type::bfloat16)
    for (int64_t k = 0; k < rows.width; ++k) room[k] = from_bfloat16(half[k]);
  else
    for (int64_t k = 0; k < rows.width; ++k) room[k] = from_float16(half[k]);
  return room;
}

void pack_transposed(const Rows& rows, float* out) {
  Room room(rows, LANES);
  for (int64_t block = 0; block < blocks_of(rows.count); ++block, out += rows.width * LANES) {
    const int64_t filled = std::min<int64_t>(LANES, rows.count - block * LANES);
    if (filled < LANES) std::fill(out, out + rows.width * LANES, 0.0f);
    const float* lanes[LANES];
    for (int64_t lane = 0; lane < filled; ++lane)
      lanes[lane] = wide_row(rows, block * LANES + lane, room.data ? room.data + lane * rows.width : nullptr);
    for (int64_t start = 0; start < rows.width; start += STEPS) {  // so many lines at a time stay in the first cache
      const int64_t end = std::min(rows.width, start + STEPS), whole = start + (end - start) / SQUARE * SQUARE;
      int64_t lane = 0;
      for (; lane + SQUARE <= filled; lane += SQUARE) {
        for (int64_t k = start; k < whole; k += SQUARE) transpose(lanes + lane, k, out + k * LANES + lane);
        for (int64_t k = whole; k < end; ++k)
          for (int64_t i = lane; i < lane + SQUARE; ++i) out[k * LANES + i] = lanes[i][k];
      }
      for (; lane < filled; ++lane)
        for (int64_t k = start; k < end; ++k) out[k * LANES + lane] = lanes[lane][k];
    }
  }
}

void pack_lanes(const Rows& rows, int64_t all, float* out) {
  Room room(rows, 1);
  const int64_t whole = rows.width / LANES, rest = rows.width % LANES;
  for (int64_t i = 0; i < rows.count; ++i) {
    const float* row = wide_row(rows, i, room.data);
    float* to = out + i * LANES;
    for (int64_t block = 0; block < whole; ++block, to += all * LANES)
      std::memcpy(to, row + block * LANES, LANES * sizeof(float));
    if (rest) {
      std::memcpy(to, row + whole * LANES, rest * sizeof(float));
      std::fill(to + rest, to + LANES, 0.0f);
    }
  }
}

void pack_transposed_pairs(const Rows& rows, uint32_t* out) {
  const int64_t pairs = (rows.width + 1) / 2;
  for (int64_t block = 0; block < blocks_of(rows.count); ++block, out += pairs * LANES) {
    const int64_t filled = std::min<int64_t>(LANES, rows.count - block * LANES);
    if (filled < LANES) std::fill(out, out + pairs * LANES, 0u);
    for (int64_t start = 0; start < rows.width / 2; start += STEPS)
      for (int64_t lane = 0; lane < filled; ++lane) {
        const uint16_t* row = half_row(rows, block * LANES + lane);
        for (int64_t k = start; k < std::min(rows.width / 2, start + STEPS); ++k)
          std::memcpy(out + k * LANES + lane, row + 2 * k, 4);
      }
    for (int64_t lane = 0; lane < filled && rows.width % 2; ++lane)
      out[(pairs - 1) * LANES + lane] = half_row(rows, block * LANES + lane)[rows.width - 1];
  }
}

void pack_lane_pairs(const Rows& rows, int64_t padded, uint32_t* out) {
  const int64_t whole = rows.width / LANES, rest = rows.width % LANES;
  for (int64_t i = 0; i < padded; ++i) {
    uint32_t* to = out + i * LANES / 2;
    if (i >= rows.count) {
      for (int64_t block = 0; block < blocks_of(rows.width); ++block, to += padded * LANES / 2)
        std::fill(to, to + LANES / 2, 0u);
      continue;
    }
    const uint16_t* row = half_row(rows, i);
    for (int64_t block = 0; block < whole; ++block, to += padded * LANES / 2)
      std::memcpy(to, row + block * LANES, LANES * 2);
    if (rest) {
      std::fill(to, to + LANES / 2, 0u);
      std::memcpy(to, row + whole * LANES, rest * 2);
    }
  }
}

void pack_row_pairs(const Rows& rows, int64_t all, uint32_t* out) {
  const int64_t blocks = blocks_of(rows.width);
  for (int64_t i = 0; i < rows.count; i += 2) {
    const uint16_t* low = half_row(rows, i);
    const uint16_t* high = i + 1 < rows.count ? half_row(rows, i + 1) : nullptr;
    for (int64_t block = 0; block < blocks; ++block) {
      uint32_t* to = out + (block * all + i / 2) * LANES;
      const int64_t filled = std::min<int64_t>(LANES, rows.width - block * LANES);
      const uint16_t *a = low + block * LANES, *b = high ? high + block * LANES : nullptr;
      if (b)
        for (int64_t k = 0; k < filled; ++k) to[k] = uint32_t(a[k]) | uint32_t(b[k]) << 16;
      else
        for (int64_t k = 0; k < filled; ++k) to[k] = a[k];
      std::fill(to + filled, to + LANES, 0u);
    }
  }
}

}  // namespace tdro
