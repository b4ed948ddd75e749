// SPDX-License-Identifier: Apache-2.0
// Compiled with the flags of quant_avx2.cc.
#if defined(__x86_64__)

#include "ffn_quant_avx2.h"

namespace {

struct Avx2Ffn : Avx2Quads {
  static constexpr bool kWideDot = false;  // two products of bytes are added in 16 bits

  static I Dot(I sum, I codes, int32_t x) {
    const I pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace

const clada::quant::FfnKernels clada::quant::kAvx2FfnKernels = MakeFfnKernels<Avx2Ffn>();

#endif  // __x86_64__
