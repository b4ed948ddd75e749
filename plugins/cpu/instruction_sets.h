// SPDX-License-Identifier: Apache-2.0
// Which kernels run on which machine, in one table.
#ifndef CLADA_CPU_INSTRUCTION_SETS_H_
#define CLADA_CPU_INSTRUCTION_SETS_H_

#include "ffn_quant_kernels.h"
#include "kernels.h"
#include "quant_kernels.h"

namespace clada {

// An instruction set, and the best kernels of each kind that need no other. FindInstructionSet is in clada/sparse_ffn.h.
struct InstructionSet {
  const char* name;
  bool (*is_here)();
  const Kernels* sparse_ffn;
  const quant::Kernels* quant_matmul;
  const quant::FfnKernels* quant_ffn;  // a SparseFFN with quantised weights uses all three
};

}  // namespace clada

#endif  // CLADA_CPU_INSTRUCTION_SETS_H_
