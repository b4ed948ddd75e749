// SPDX-License-Identifier: Apache-2.0
// The vectors of NEON with dot products.
#ifndef CLADA_CPU_QUANT_NEON_H_
#define CLADA_CPU_QUANT_NEON_H_

#include <arm_neon.h>

#include "quant_body.h"

namespace {

struct NeonDot {
  using I = int32x4_t;
  using F = float32x4_t;
  static constexpr int kLanes = 4;

  static I LoadBytes(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
  static I SetByte(int value) { return vreinterpretq_s32_u8(vdupq_n_u8(static_cast<uint8_t>(value))); }
  static I SetInt(int32_t value) { return vdupq_n_s32(value); }
  static I And(I a, I b) { return vandq_s32(a, b); }
  static I Or(I a, I b) { return vorrq_s32(a, b); }
  // To the left by kBy bits, to the right by -kBy.
  template <int kBy>
  static I Shift(I value) {
    if constexpr (kBy > 0) return vshlq_n_s32(value, kBy);
    else if constexpr (kBy < 0) return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(value), -kBy));
    else return value;
  }
  static I Dot(I sum, I codes, int32_t x) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(vdupq_n_s32(x)));
  }
  template <int kBits, int kRows>
  static void Sums(const uint8_t* high, const uint8_t* low, const int8_t* x, int64_t stride, I (&sum)[kRows]) {
    if constexpr (kBits < 8) {
      DotSums<NeonDot, kBits, kRows>(high, low, x, stride, sum);
    } else {
      // The product is of signed bytes, and whole codes are not: the planes apart, which are.
      I part[kRows];
      for (int r = 0; r < kRows; ++r) part[r] = vdupq_n_s32(0);
      DotSums<NeonDot, kHighBits, kRows>(high, low, x, stride, part);
      for (int r = 0; r < kRows; ++r) sum[r] = vaddq_s32(sum[r], vshlq_n_s32(part[r], kHighBits));
      DotSums<NeonDot, kHighBits, kRows>(low, low, x, stride, sum);
    }
  }

  static F Set(float value) { return vdupq_n_f32(value); }
  static F ToFloat(I value) { return vcvtq_f32_s32(value); }
  static F Mul(F a, F b) { return vmulq_f32(a, b); }
  static F Fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F LoadHalf(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
  static void Store(float* p, F value) { vst1q_f32(p, value); }

  static uint32_t LargestMagnitude(const float* x) {
    uint32x4_t most = vdupq_n_u32(0);
    for (int i = 0; i < kBlock; i += 4)
      most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(0x7fffffff)));
    return vmaxvq_u32(most);
  }
  // q = x * inverse, rounded to the nearest; their sum.
  static int32_t Round(const float* x, float inverse, int8_t* q) {
    I all = vdupq_n_s32(0);
    for (int i = 0; i < kBlock; i += 8) {
      const I a = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse));
      const I b = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), inverse));
      all = vaddq_s32(all, vaddq_s32(a, b));
      vst1_s8(q + i, vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))));
    }
    return vaddvq_s32(all);
  }
};

}  // namespace

#endif  // CLADA_CPU_QUANT_NEON_H_
