// SPDX-License-Identifier: Apache-2.0
// Compiled with the flags of quant_avxvnni.cc.
#if defined(__x86_64__)

#include "ffn_quant_avx2.h"

namespace {

struct AvxVnniFfn : Avx2Quads {
  static constexpr bool kWideDot = true;

  static I Dot(I sum, I codes, int32_t x) { return _mm256_dpbusd_avx_epi32(sum, codes, _mm256_set1_epi32(x)); }
};

}  // namespace

const clada::quant::FfnKernels clada::quant::kAvxVnniFfnKernels = MakeFfnKernels<AvxVnniFfn>();

#endif  // __x86_64__
