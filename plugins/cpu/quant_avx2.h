// SPDX-License-Identifier: Apache-2.0
// What AVX2 and AVX-VNNI share: everything but the products of bytes.
#ifndef CLADA_CPU_QUANT_AVX2_H_
#define CLADA_CPU_QUANT_AVX2_H_

#include <immintrin.h>

#include "quant_body.h"

namespace {

struct Avx2Base {
  using I = __m256i;
  using F = __m256;
  static constexpr int kLanes = 8;

  static I LoadBytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I SetByte(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static I SetInt(int32_t value) { return _mm256_set1_epi32(value); }
  static I And(I a, I b) { return _mm256_and_si256(a, b); }
  static I Or(I a, I b) { return _mm256_or_si256(a, b); }
  // To the left by kBy bits, to the right by -kBy.
  template <int kBy>
  static I Shift(I value) {
    if constexpr (kBy > 0) return _mm256_slli_epi32(value, kBy);
    else if constexpr (kBy < 0) return _mm256_srli_epi32(value, -kBy);
    else return value;
  }

  static F Set(float value) { return _mm256_set1_ps(value); }
  static F ToFloat(I value) { return _mm256_cvtepi32_ps(value); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F LoadHalf(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void Store(float* p, F value) { _mm256_storeu_ps(p, value); }

  static uint32_t LargestMagnitude(const float* x) {
    const I magnitude = _mm256_set1_epi32(0x7fffffff);
    I most = _mm256_setzero_si256();
    for (int i = 0; i < 32; i += 8)
      most = _mm256_max_epu32(most, _mm256_and_si256(LoadBytes(reinterpret_cast<const uint8_t*>(x + i)), magnitude));
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
  }
  // q = x * inverse, rounded to the nearest; their sum.
  static int32_t Round(const float* x, float inverse, int8_t* q) {
    I part[4], all = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
      const F value = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(inverse));
      part[i] = _mm256_cvtps_epi32(_mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      all = _mm256_add_epi32(all, part[i]);
    }
    const I bytes = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
    // Packing leaves fours of numbers in the order 0 2 4 6 1 3 5 7.
    const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_permutevar8x32_epi32(bytes, order));
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
  }
};

}  // namespace

#endif  // CLADA_CPU_QUANT_AVX2_H_
