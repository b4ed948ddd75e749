// SPDX-License-Identifier: Apache-2.0
// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels_table.h"

namespace {

struct Avx512 {
  using F = __m512;
  static constexpr int64_t kWidth = 16;
  static constexpr int kPanelRows = 8, kPanelParts = 1;  // a tile's rows; its columns are a part of a panel's

  static F Set(float value) { return _mm512_set1_ps(value); }
  static F Load(const float* p) { return _mm512_loadu_ps(p); }
  static void Store(float* p, F value) { _mm512_storeu_ps(p, value); }
  static F LoadWeight(const float* p) { return _mm512_loadu_ps(p); }
  static F LoadWeight(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F LoadWeight(const BFloat* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static float HalfToFloat(Half value) { return _cvtsh_ss(value.bits); }
  static void LoadPairs(const float* p, F* even, F* odd) {
    const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const F low = Load(p), high = Load(p + 16);
    *even = _mm512_permutex2var_ps(low, first, high);
    *odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(first, _mm512_set1_epi32(1)), high);
  }
  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm512_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F Min(F a, F b) { return _mm512_min_ps(a, b); }
  static F Max(F a, F b) { return _mm512_max_ps(a, b); }
  // The second operand is what a NaN gives, so that relu(NaN) stays NaN.
  static F Relu(F value) { return _mm512_max_ps(_mm512_setzero_ps(), value); }
  static F Round(F value) { return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F SelectLess(F a, F b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
  static F PowerOfTwo(F n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
  }
  static F SplitExponent(F value, F* exponent) {
    *exponent = _mm512_add_ps(_mm512_getexp_ps(value), Set(1.0f));
    return _mm512_getmant_ps(value, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_src);
  }
  static float Sum(F value) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps(value, 1));
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  // columns[k] = number k of sixteen rows, `stride` apart. Parts of rows are put together as they are loaded: that leaves half of
  // the shuffles.
  static void LoadColumns(const float* p, int64_t stride, F (&columns)[16]) {
    for (int k = 0; k < 16; k += 4) {
      F part[4];  // part[i]: rows i, i + 4, i + 8, i + 12
      for (int i = 0; i < 4; ++i, p += stride) {
        part[i] = _mm512_castps128_ps512(_mm_loadu_ps(p));
        part[i] = _mm512_insertf32x4(part[i], _mm_loadu_ps(p + 4 * stride), 1);
        part[i] = _mm512_insertf32x4(part[i], _mm_loadu_ps(p + 8 * stride), 2);
        part[i] = _mm512_insertf32x4(part[i], _mm_loadu_ps(p + 12 * stride), 3);
      }
      p += 4 - 4 * stride;
      const F a = _mm512_unpacklo_ps(part[0], part[1]), b = _mm512_unpacklo_ps(part[2], part[3]);
      const F c = _mm512_unpackhi_ps(part[0], part[1]), e = _mm512_unpackhi_ps(part[2], part[3]);
      columns[k] = _mm512_shuffle_ps(a, b, 0x44);
      columns[k + 1] = _mm512_shuffle_ps(a, b, 0xee);
      columns[k + 2] = _mm512_shuffle_ps(c, e, 0x44);
      columns[k + 3] = _mm512_shuffle_ps(c, e, 0xee);
    }
  }
  // Sixteen bytes become 32 numbers by a table look-up: the permutation reads only the low four bits of its index.
  static F ShadowBlock(const uint8_t* q, const float* x) {
    const F levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    const F low = _mm512_permutexvar_ps(bytes, levels);
    const F high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), levels);
    return Fma(high, Load(x + 16), Mul(low, Load(x)));
  }
};

}  // namespace

const clada::Kernels clada::kAvx512Kernels = MakeKernels<Avx512>("avx512");

#endif  // __x86_64__
