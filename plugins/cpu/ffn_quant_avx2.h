// SPDX-License-Identifier: Apache-2.0
// What AVX2 and AVX-VNNI share, over a base of quant_avx2.h or one derived from it.
#ifndef CLADA_CPU_FFN_QUANT_AVX2_H_
#define CLADA_CPU_FFN_QUANT_AVX2_H_

#include "quant_avx2.h"

#include "ffn_quant_body.h"

namespace {

struct Avx2Quads : Avx2Base {
  // Within each 128 bits: bytes i of four neurons' 32-bit words become word i.
  static I Transpose(I words) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order));
  }
  static __m128i Load128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m128i Load64(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static I Join(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }

  template <int kWidth>
  static void Quad(const uint8_t* const* p, int64_t at, I (&out)[kWidth]) {
    if constexpr (kWidth == 4) {
      const I a = LoadBytes(p[0] + at), b = LoadBytes(p[1] + at), c = LoadBytes(p[2] + at), d = LoadBytes(p[3] + at);
      const I ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
      const I ef = _mm256_unpackhi_epi8(a, b), gh = _mm256_unpackhi_epi8(c, d);
      out[0] = _mm256_unpacklo_epi16(ab, cd);
      out[1] = _mm256_unpackhi_epi16(ab, cd);
      out[2] = _mm256_unpacklo_epi16(ef, gh);
      out[3] = _mm256_unpackhi_epi16(ef, gh);
    } else if constexpr (kWidth == 2) {
      // Words of a neuron: unit 0 of out[0] and out[1], then unit 1 of both.
      const __m128i ab = _mm_unpacklo_epi32(Load128(p[0] + at), Load128(p[1] + at));
      const __m128i cd = _mm_unpacklo_epi32(Load128(p[2] + at), Load128(p[3] + at));
      const __m128i ef = _mm_unpackhi_epi32(Load128(p[0] + at), Load128(p[1] + at));
      const __m128i gh = _mm_unpackhi_epi32(Load128(p[2] + at), Load128(p[3] + at));
      out[0] = Transpose(Join(_mm_unpacklo_epi64(ab, cd), _mm_unpacklo_epi64(ef, gh)));
      out[1] = Transpose(Join(_mm_unpackhi_epi64(ab, cd), _mm_unpackhi_epi64(ef, gh)));
    } else {
      static_assert(kWidth == 1, "planes are 1, 2 or 4 bits wide");
      const __m128i ab = _mm_unpacklo_epi32(Load64(p[0] + at), Load64(p[1] + at));
      const __m128i cd = _mm_unpacklo_epi32(Load64(p[2] + at), Load64(p[3] + at));
      out[0] = Transpose(Join(_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd)));
    }
  }

  static I AddInt(I a, I b) { return _mm256_add_epi32(a, b); }
  static void StoreInts(int32_t* p, I value) { _mm256_storeu_si256(reinterpret_cast<I*>(p), value); }
  // Lanes come in fours: all, or the first half.
  static F LoadFloats(const float* p, int count) {
    return count == kLanes ? _mm256_loadu_ps(p) : _mm256_zextps128_ps256(_mm_loadu_ps(p));
  }
  static void StoreFloats(float* p, F value, int count) {
    count == kLanes ? _mm256_storeu_ps(p, value) : _mm_storeu_ps(p, _mm256_castps256_ps128(value));
  }
  static F LoadHalves(const uint8_t* p, int count) { return _mm256_cvtph_ps(count == kLanes ? Load128(p) : Load64(p)); }
};

}  // namespace

#endif  // CLADA_CPU_FFN_QUANT_AVX2_H_
