// SPDX-License-Identifier: Apache-2.0
// Compiled with the flags of quant_avx512vnni.cc. Machines with AMX use it too: for one row tiles bring nothing.
#if defined(__x86_64__)

#include "quant_avx512vnni.h"

#include "ffn_quant_body.h"

namespace {

struct Avx512VnniFfn : Avx512Vnni {
  static constexpr bool kWideDot = true;

  // Within each 128 bits: bytes i of four neurons' 32-bit words become word i.
  static I Transpose(I words) {
    const I order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm512_shuffle_epi8(words, order);
  }
  static __m128i Load128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m256i Load256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

  template <int kWidth>
  static void Quad(const uint8_t* const* p, int64_t at, I (&out)[kWidth]) {
    if constexpr (kWidth == 4) {
      const I a = LoadBytes(p[0] + at), b = LoadBytes(p[1] + at), c = LoadBytes(p[2] + at), d = LoadBytes(p[3] + at);
      const I ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
      const I ef = _mm512_unpackhi_epi8(a, b), gh = _mm512_unpackhi_epi8(c, d);
      out[0] = _mm512_unpacklo_epi16(ab, cd);
      out[1] = _mm512_unpackhi_epi16(ab, cd);
      out[2] = _mm512_unpacklo_epi16(ef, gh);
      out[3] = _mm512_unpackhi_epi16(ef, gh);
    } else if constexpr (kWidth == 2) {
      const I ab = _mm512_inserti64x4(_mm512_castsi256_si512(Load256(p[0] + at)), Load256(p[1] + at), 1);
      const I cd = _mm512_inserti64x4(_mm512_castsi256_si512(Load256(p[2] + at)), Load256(p[3] + at), 1);
      // Word 2 L + t of each neuron goes to out[t], lane 4 L + neuron.
      const I first = _mm512_setr_epi32(0, 8, 16, 24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30);
      out[0] = Transpose(_mm512_permutex2var_epi32(ab, first, cd));
      out[1] = Transpose(_mm512_permutex2var_epi32(ab, _mm512_add_epi32(first, _mm512_set1_epi32(1)), cd));
    } else {
      static_assert(kWidth == 1, "planes are 1, 2 or 4 bits wide");
      I all = _mm512_castsi128_si512(Load128(p[0] + at));
      all = _mm512_mask_broadcast_i32x4(all, 0x00f0, Load128(p[1] + at));
      all = _mm512_mask_broadcast_i32x4(all, 0x0f00, Load128(p[2] + at));
      all = _mm512_mask_broadcast_i32x4(all, 0xf000, Load128(p[3] + at));
      const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      out[0] = Transpose(_mm512_permutexvar_epi32(order, all));
    }
  }

  static I AddInt(I a, I b) { return _mm512_add_epi32(a, b); }
  static void StoreInts(int32_t* p, I value) { _mm512_storeu_si512(p, value); }
  static __mmask16 Mask(int count) { return static_cast<__mmask16>((1u << count) - 1); }
  static F LoadFloats(const float* p, int count) { return count == kLanes ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(Mask(count), p); }
  static void StoreFloats(float* p, F value, int count) {
    count == kLanes ? _mm512_storeu_ps(p, value) : _mm512_mask_storeu_ps(p, Mask(count), value);
  }
  static F LoadHalves(const uint8_t* p, int count) {
    return count == kLanes ? LoadHalf(p) : _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(Mask(count), p));
  }
};

}  // namespace

const clada::quant::FfnKernels clada::quant::kAvx512VnniFfnKernels = MakeFfnKernels<Avx512VnniFfn>();

#endif  // __x86_64__
