// SPDX-License-Identifier: Apache-2.0
// Compiled with -mavx2 -mavxvnni -mfma -mf16c.
#if defined(__x86_64__)

#include "quant_avx2.h"

namespace {

struct AvxVnni : Avx2Base {
  static I Dot(I sum, I codes, int32_t x) { return _mm256_dpbusd_avx_epi32(sum, codes, _mm256_set1_epi32(x)); }
  template <int kBits, int kRows>
  static void Sums(const uint8_t* high, const uint8_t* low, const int8_t* x, int64_t stride, I (&sum)[kRows]) {
    DotSums<AvxVnni, kBits, kRows>(high, low, x, stride, sum);
  }
};

}  // namespace

const clada::quant::Kernels clada::quant::kAvxVnniKernels = MakeKernels<AvxVnni>("avxvnni");

#endif  // __x86_64__
