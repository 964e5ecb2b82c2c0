// Half precision for kernels that are compiled by nvcc, and by a plain C++ compiler that emulates them.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define TDRO_DEVICE __device__ __forceinline__
#define TDRO_UNROLL _Pragma("unroll")
#else
#include <cmath>
#include <cstring>
#define TDRO_DEVICE inline
#define TDRO_UNROLL
#endif

namespace tdro_tiles {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Four neighbours, moved by one instruction.
template <class Number>
struct alignas(4 * sizeof(Number)) Four {
  Number items[4];
};

TDRO_DEVICE float widen(float number) { return number; }

#ifdef __CUDACC__

TDRO_DEVICE float widen(Bfloat16 number) { return __bfloat162float(__ushort_as_bfloat16(number.bits)); }
TDRO_DEVICE float widen(Float16 number) { return __half2float(__ushort_as_half(number.bits)); }
TDRO_DEVICE void narrow(float number, float& to) { to = number; }
TDRO_DEVICE void narrow(float number, Bfloat16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(number)); }
TDRO_DEVICE void narrow(float number, Float16& to) { to.bits = __half_as_ushort(__float2half_rn(number)); }

#else

inline uint32_t bits_of(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

inline float widen(Bfloat16 number) {
  const uint32_t bits = uint32_t(number.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline float widen(Float16 number) {
  const int exponent = number.bits >> 10 & 31, fraction = number.bits & 1023;
  float wide = exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24);
  if (exponent == 31) wide = fraction ? NAN : INFINITY;
  return number.bits >> 15 ? -wide : wide;
}

inline void narrow(float number, float& to) { to = number; }

inline void narrow(float number, Bfloat16& to) {
  const uint32_t bits = bits_of(number);
  to.bits = std::isnan(number) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // ties to even
}

inline void narrow(float number, Float16& to) {
  const uint16_t sign = uint16_t(std::signbit(number) << 15);
  const float size = std::fabs(number);
  if (std::isnan(number)) {
    to.bits = 0x7fff;
  } else if (size >= 65520) {  // rounds to more than the largest, 65504
    to.bits = sign | 0x7c00;
  } else if (size < 0x1p-14f) {  // in steps of 2^-24; 1024 of them are the bits of 2^-14
    to.bits = uint16_t(sign | int(std::nearbyint(size * 0x1p24f)));
  } else {
    int exponent;
    const float fraction = std::frexp(size, &exponent);  // 0.5 <= fraction < 1
    // Rounding up to 2048 steps carries into the exponent, as it should.
    to.bits = uint16_t(sign | (((exponent + 13) << 10) + int(std::nearbyint(fraction * 2048))));
  }
}

#endif

}  // namespace tdro_tiles
