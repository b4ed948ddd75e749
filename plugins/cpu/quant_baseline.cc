// SPDX-License-Identifier: Apache-2.0
// Plain C++, for machines without the others' instructions.
#include "quant_baseline.h"

const clada::quant::Kernels clada::quant::kBaselineKernels = MakeKernels<Baseline>("baseline");
