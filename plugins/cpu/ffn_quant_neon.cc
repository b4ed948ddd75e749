// SPDX-License-Identifier: Apache-2.0
// Compiled with the flags of quant_neon.cc.
#if defined(__aarch64__)

#include "quant_neon.h"

#include "ffn_quant_body.h"

namespace {

struct NeonFfn : NeonDot {
  static constexpr bool kWideDot = false;  // the product is of signed bytes

  static uint8x16_t Bytes(I value) { return vreinterpretq_u8_s32(value); }
  // Bytes i of four neurons' words become word i.
  static I Transpose(I words) {
    static constexpr uint8_t kOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    return vreinterpretq_s32_u8(vqtbl1q_u8(Bytes(words), vld1q_u8(kOrder)));
  }
  static int32_t Word(const uint8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof(word));
    return word;
  }

  template <int kWidth>
  static void Quad(const uint8_t* const* p, int64_t at, I (&out)[kWidth]) {
    if constexpr (kWidth == 4) {
      const uint8x16x2_t ab = vzipq_u8(vld1q_u8(p[0] + at), vld1q_u8(p[1] + at));
      const uint8x16x2_t cd = vzipq_u8(vld1q_u8(p[2] + at), vld1q_u8(p[3] + at));
      for (int half = 0; half < 2; ++half) {
        const uint16x8x2_t all = vzipq_u16(vreinterpretq_u16_u8(ab.val[half]), vreinterpretq_u16_u8(cd.val[half]));
        out[2 * half] = vreinterpretq_s32_u16(all.val[0]);
        out[2 * half + 1] = vreinterpretq_s32_u16(all.val[1]);
      }
    } else {
      for (int t = 0; t < kWidth; ++t) {
        const int32_t words[4] = {Word(p[0] + at + 4 * t), Word(p[1] + at + 4 * t), Word(p[2] + at + 4 * t), Word(p[3] + at + 4 * t)};
        out[t] = Transpose(vld1q_s32(words));
      }
    }
  }

  static I AddInt(I a, I b) { return vaddq_s32(a, b); }
  static void StoreInts(int32_t* p, I value) { vst1q_s32(p, value); }
  static F LoadFloats(const float* p, int) { return vld1q_f32(p); }
  static void StoreFloats(float* p, F value, int) { vst1q_f32(p, value); }
  static F LoadHalves(const uint8_t* p, int) { return LoadHalf(p); }
};

}  // namespace

const clada::quant::FfnKernels clada::quant::kNeonDotFfnKernels = MakeFfnKernels<NeonFfn>();

#endif  // __aarch64__
