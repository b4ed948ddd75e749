// SPDX-License-Identifier: Apache-2.0
// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c.
#if defined(__x86_64__)

#include "quant_avx512vnni.h"

const clada::quant::Kernels clada::quant::kAvx512VnniKernels = MakeKernels<Avx512Vnni>("avx512vnni");

#endif  // __x86_64__
