// SPDX-License-Identifier: Apache-2.0
// The vectors of AVX-512 VNNI, for rows of their own and for what AMX leaves to them.
#ifndef CLADA_CPU_QUANT_AVX512VNNI_H_
#define CLADA_CPU_QUANT_AVX512VNNI_H_

#include <immintrin.h>

#include "quant_body.h"

namespace {

struct Avx512Vnni {
  using I = __m512i;
  using F = __m512;
  static constexpr int kLanes = 16;

  static I LoadBytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I SetByte(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static I SetInt(int32_t value) { return _mm512_set1_epi32(value); }
  static I And(I a, I b) { return _mm512_and_si512(a, b); }
  static I Or(I a, I b) { return _mm512_or_si512(a, b); }
  // To the left by kBy bits, to the right by -kBy.
  template <int kBy>
  static I Shift(I value) {
    if constexpr (kBy > 0) return _mm512_slli_epi32(value, kBy);
    else if constexpr (kBy < 0) return _mm512_srli_epi32(value, -kBy);
    else return value;
  }
  static I Dot(I sum, I codes, int32_t x) { return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(x)); }
  template <int kBits, int kRows>
  static void Sums(const uint8_t* high, const uint8_t* low, const int8_t* x, int64_t stride, I (&sum)[kRows]) {
    DotSums<Avx512Vnni, kBits, kRows>(high, low, x, stride, sum);
  }

  static F Set(float value) { return _mm512_set1_ps(value); }
  static F ToFloat(I value) { return _mm512_cvtepi32_ps(value); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F LoadHalf(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void Store(float* p, F value) { _mm512_storeu_ps(p, value); }

  static uint32_t LargestMagnitude(const float* x) {
    const I magnitude = _mm512_set1_epi32(0x7fffffff);
    const I a = _mm512_and_si512(_mm512_loadu_si512(x), magnitude), b = _mm512_and_si512(_mm512_loadu_si512(x + 16), magnitude);
    return _mm512_reduce_max_epu32(_mm512_max_epu32(a, b));
  }
  // q = x * inverse, rounded to the nearest; their sum.
  static int32_t Round(const float* x, float inverse, int8_t* q) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const F by = _mm512_set1_ps(inverse);
    const I a = _mm512_cvt_roundps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), by), kNearest);
    const I b = _mm512_cvt_roundps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), by), kNearest);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16), _mm512_cvtepi32_epi8(b));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
  }
};

}  // namespace

#endif  // CLADA_CPU_QUANT_AVX512VNNI_H_
