// SPDX-License-Identifier: Apache-2.0
// Compiled with -march=armv8.2-a+dotprod.
#if defined(__aarch64__)

#include "quant_neon.h"

const clada::quant::Kernels clada::quant::kNeonDotKernels = MakeKernels<NeonDot>("neondot");

#endif  // __aarch64__
