// SPDX-License-Identifier: Apache-2.0
// A SparseFFN whose weights are quantised (docs/sparse-ffn-op.md, "Quantised weights"). Gate and up are products of QuantMatMul.
#ifndef CLADA_CPU_FFN_QUANT_H_
#define CLADA_CPU_FFN_QUANT_H_

#include "clada/sparse_ffn.h"

namespace clada::quant {

// As ScratchBytes and RunSparseFFN, for a problem that is `quantised()`.
size_t FfnScratchBytes(const clada::Problem& problem);
void RunFfn(const clada::Problem& problem, const Host& host, void* scratch);

}  // namespace clada::quant

#endif  // CLADA_CPU_FFN_QUANT_H_
