// SPDX-License-Identifier: Apache-2.0
// Which kernels run on which machine, in one table.
#ifndef CLADA_CPU_INSTRUCTION_SETS_H_
#define CLADA_CPU_INSTRUCTION_SETS_H_

#include "kernels.h"
#include "quant_kernels.h"

namespace clada {

// An instruction set, and the best kernels of each op that need no other.
struct InstructionSet {
  const char* name;
  bool (*is_here)();
  const Kernels* sparse_ffn;
  const quant::Kernels* quant_matmul;
};

// The named one, or the best this machine has when `name` is null or empty. Null when it is unknown or the machine lacks it.
const InstructionSet* FindInstructionSet(const char* name);

}  // namespace clada

#endif  // CLADA_CPU_INSTRUCTION_SETS_H_
