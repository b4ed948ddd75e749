// SPDX-License-Identifier: Apache-2.0
// Compiled with -mavx2 -mfma -mf16c.
#if defined(__x86_64__)

#include "quant_avx2.h"

namespace {

struct Avx2 : Avx2Base {
  // maddubs adds two products in 16 bits, and saturates. A plane's values are at most 15, x's magnitudes at most 127: the products of
  // all eight steps stay below what 16 bits hold, so they are widened once a block. Whole codes would saturate.
  static_assert(kSteps * 2 * ((1 << kHighBits) - 1) * 127 <= 32767, "a block's sums of a plane fit 16 bits");
  static_assert(kHighBits == 4, "low planes are no wider");

  template <int kWidth, int kRows, int kStepAt = 0>
  static void PlaneSums(const uint8_t* plane, const int8_t* x, int64_t stride, I (&sum)[kRows]) {
    if constexpr (kStepAt < kSteps) {
      constexpr int kPer = 8 / kWidth;
      const I run = Shift<-kWidth * (kStepAt % kPer)>(LoadBytes(plane + kStepAt / kPer * kRun));
      const I values = And(run, SetByte((1 << kWidth) - 1));
      for (int r = 0; r < kRows; ++r)
        sum[r] = _mm256_add_epi16(sum[r], _mm256_maddubs_epi16(values, SetInt(StepOf(x + r * stride, kStepAt))));
      PlaneSums<kWidth, kRows, kStepAt + 1>(plane, x, stride, sum);
    }
  }

  template <int kWidth, int kRows>
  static void AddPlane(const uint8_t* plane, int factor, const int8_t* x, int64_t stride, I (&sum)[kRows]) {
    I narrow[kRows];
    for (int r = 0; r < kRows; ++r) narrow[r] = _mm256_setzero_si256();
    PlaneSums<kWidth, kRows>(plane, x, stride, narrow);
    const I by = _mm256_set1_epi16(static_cast<short>(factor));
    for (int r = 0; r < kRows; ++r) sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(narrow[r], by));
  }

  template <int kBits, int kRows>
  static void Sums(const uint8_t* high, const uint8_t* low, const int8_t* x, int64_t stride, I (&sum)[kRows]) {
    constexpr int kLow = kBits - kHighBits;
    AddPlane<kHighBits, kRows>(high, 1 << kLow, x, stride, sum);
    if constexpr (kLow > 0) AddPlane<kLow, kRows>(low, 1, x, stride, sum);
  }
};

}  // namespace

const clada::quant::Kernels clada::quant::kAvx2Kernels = MakeKernels<Avx2>("avx2");

#endif  // __x86_64__
