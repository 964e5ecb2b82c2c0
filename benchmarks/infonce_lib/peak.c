/* Floating-point peak of a core: chains of multiply-adds that never leave the registers. Built by roofline.py. */

#if defined(__AVX512F__)
#define WIDTH 64
#else
#define WIDTH 32
#endif
typedef float vector __attribute__((vector_size(WIDTH)));

#define TWELVE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

/* Operations of one call; *sink receives a value that depends on all of them. factor < 1 keeps them finite. */
double float32_operations(long rounds, float factor, float *sink) {
#define START(k) vector sum##k = {(float)k};
#define STEP(k) sum##k = sum##k * factors + factors;
#define ADD(k) all += sum##k;
  TWELVE(START)
  vector factors = (vector){0} + factor, all = {0};
  for (long round = 0; round < rounds; round++) {
    TWELVE(STEP)
  }
  TWELVE(ADD)
  *sink = all[0];
  return 2.0 * 12 * (WIDTH / sizeof(float)) * rounds;
}

#if defined(__AVX512BF16__)
#include <immintrin.h>
/* The same for pairs of bfloat16 products summed in float32. */
double bfloat16_operations(long rounds, float factor, float *sink) {
#define START_HALF(k) __m512 half##k = _mm512_set1_ps((float)k);
#define STEP_HALF(k) half##k = _mm512_dpbf16_ps(half##k, pairs, pairs);
#define ADD_HALF(k) all = _mm512_add_ps(all, half##k);
  TWELVE(START_HALF)
  __m512 wide = _mm512_set1_ps(factor), all = _mm512_setzero_ps();
  __m512bh pairs = _mm512_cvtne2ps_pbh(wide, wide);
  for (long round = 0; round < rounds; round++) {
    TWELVE(STEP_HALF)
  }
  TWELVE(ADD_HALF)
  *sink = _mm512_cvtss_f32(all);
  return 2.0 * 12 * 32 * rounds;
}
#else
double bfloat16_operations(long rounds, float factor, float *sink) {
  (void)rounds;
  *sink = factor;
  return 0.0;
}
#endif
