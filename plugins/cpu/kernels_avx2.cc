// SPDX-License-Identifier: Apache-2.0
// Compiled with -mavx2 -mfma -mf16c.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels_table.h"

namespace {

struct Avx2 {
  using F = __m256;
  static constexpr int64_t kWidth = 8;
  static constexpr int kPanelRows = 4, kPanelParts = 2;  // a tile's rows; its columns are a part of a panel's

  static F Set(float value) { return _mm256_set1_ps(value); }
  static F Load(const float* p) { return _mm256_loadu_ps(p); }
  static void Store(float* p, F value) { _mm256_storeu_ps(p, value); }
  static F LoadWeight(const float* p) { return _mm256_loadu_ps(p); }
  static F LoadWeight(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F LoadWeight(const BFloat* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static float HalfToFloat(Half value) { return _cvtsh_ss(value.bits); }
  static void LoadPairs(const float* p, F* even, F* odd) {
    const F low = Load(p), high = Load(p + 8);
    const F a = _mm256_permute2f128_ps(low, high, 0x20), b = _mm256_permute2f128_ps(low, high, 0x31);
    // Within each half: (g0 u0 g1 u1) and (g2 u2 g3 u3).
    *even = _mm256_shuffle_ps(a, b, 0x88);
    *odd = _mm256_shuffle_ps(a, b, 0xdd);
  }
  static F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm256_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F Min(F a, F b) { return _mm256_min_ps(a, b); }
  static F Max(F a, F b) { return _mm256_max_ps(a, b); }
  // The second operand is what a NaN gives, so that relu(NaN) stays NaN.
  static F Relu(F value) { return _mm256_max_ps(_mm256_setzero_ps(), value); }
  static F Round(F value) { return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F SelectLess(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static F PowerOfTwo(F n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static F SplitExponent(F value, F* exponent) {
    const __m256i bits = _mm256_castps_si256(value);
    *exponent = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(126)));
    return _mm256_castsi256_ps(
        _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff)), _mm256_set1_epi32(0x3f000000)));
  }
  static float Sum(F value) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  // columns[k] = number k of eight rows, `stride` apart.
  static void LoadColumns(const float* p, int64_t stride, F (&columns)[8]) {
    for (int k = 0; k < 8; k += 4) {
      F part[4];  // part[i]: rows i and i + 4
      for (int i = 0; i < 4; ++i, p += stride)
        part[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
      p += 4 - 4 * stride;
      const F a = _mm256_unpacklo_ps(part[0], part[1]), b = _mm256_unpacklo_ps(part[2], part[3]);
      const F c = _mm256_unpackhi_ps(part[0], part[1]), e = _mm256_unpackhi_ps(part[2], part[3]);
      columns[k] = _mm256_shuffle_ps(a, b, 0x44);
      columns[k + 1] = _mm256_shuffle_ps(a, b, 0xee);
      columns[k + 2] = _mm256_shuffle_ps(c, e, 0x44);
      columns[k + 3] = _mm256_shuffle_ps(c, e, 0xee);
    }
  }
  static F Levels(__m128i nibbles) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(nibbles)); }
  static F ShadowBlock(const uint8_t* q, const float* x) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    const F a = Fma(Levels(_mm_srli_si128(low, 8)), Load(x + 8), Mul(Levels(low), Load(x)));
    const F b = Fma(Levels(_mm_srli_si128(high, 8)), Load(x + 24), Mul(Levels(high), Load(x + 16)));
    return Add(a, b);
  }
};

}  // namespace

const clada::Kernels clada::kAvx2Kernels = MakeKernels<Avx2>("avx2");

#endif  // __x86_64__
