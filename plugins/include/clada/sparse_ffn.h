// SPDX-License-Identifier: Apache-2.0
// The kernel of com.clada::SparseFFN on raw pointers: no framework, no allocation, no threads of its own.
//
// docs/sparse-ffn-op.md is the contract. Notation: d hidden size, f neurons, n = 2 (gate, up) or 1 (up), g granule, E = f / g.
#ifndef CLADA_SPARSE_FFN_H_
#define CLADA_SPARSE_FFN_H_

#include <cstddef>
#include <cstdint>

#include "clada/contract_tables.h"

// Device code calls the few functions of this header too.
#ifdef __CUDACC__
#define CLADA_ANYWHERE __host__ __device__
#else
#define CLADA_ANYWHERE
#endif

namespace clada {

CLADA_ANYWHERE constexpr int64_t SizeOf(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// Bits of a code in quantised weights; meaningless for plain ones.
CLADA_ANYWHERE constexpr int FormatBits(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4: return 4;
    case WeightFormat::kInt5: return 5;
    case WeightFormat::kInt6: return 6;
    default: return 8;
  }
}

// One call, with pointers to its inputs and outputs. Rows are batch x sequence; a shape without batch is one batch. Inputs need no
// alignment beyond their element's.
struct Problem : InputPointers, OutputPointers {
  Attributes attributes;
  int64_t batch = 0;
  int64_t sequence = 0;
  int64_t hidden_size = 0;        // d
  int64_t intermediate_size = 0;  // f
  FloatType weight_type = FloatType::kFloat32;  // of w_in and w_out, unless they are quantised
  FloatType x_type = FloatType::kFloat32;       // of x and y: float32, or weight_type
  int64_t threshold_count = 1;
  bool score_per_sequence = false;  // score is [batch, E]

  CLADA_ANYWHERE int64_t rows() const { return batch * sequence; }
  CLADA_ANYWHERE int64_t granules() const { return intermediate_size / attributes.granule; }
  CLADA_ANYWHERE bool quantised() const { return attributes.weight_format != WeightFormat::kPlain; }
  CLADA_ANYWHERE int64_t projections() const { return attributes.gated ? 2 : 1; }
};

// How many of `granules` the rule topk takes: `wanted`, an integer in float32, within 1 .. granules. Above 2^24 there are counts that
// no float32 has, so they are compared in float64. What is not a number takes one.
CLADA_ANYWHERE inline int64_t TopCount(float wanted, int64_t granules) {
  if (static_cast<double>(wanted) >= static_cast<double>(granules)) return granules;
  return wanted >= 1.0f ? static_cast<int64_t>(wanted) : 1;
}

// The host's thread pool: calls body(context, i) for every i in [0, count), in any order, on any threads, and returns when
// all calls have returned. The bodies do not throw.
using ParallelBody = void (*)(void* context, size_t index);
struct ParallelFor {
  void (*run)(void* host, size_t count, ParallelBody body, void* context) = nullptr;  // null: the calling thread
  void* host = nullptr;
};

// The names of all instruction sets, for messages. Which there are, and which kernels each op has for them, is
// cpu/instruction_sets.cc.
const char* InstructionSetNames();

// The kernels of this op for an instruction set.
struct Kernels;
// The named one, or the best this machine has when name is null or empty. Null when it is unknown or the machine lacks it.
const Kernels* FindKernels(const char* name);
const char* KernelsName(const Kernels* kernels);

// All kernels of an instruction set, found as those are.
struct InstructionSet;
const InstructionSet* FindInstructionSet(const char* name);

struct Host {
  ParallelFor parallel_for;
  const Kernels* kernels = nullptr;
  const InstructionSet* set = nullptr;  // for quantised weights
};

// Bytes of scratch memory that a call of these sizes needs. Looks at no pointer.
size_t ScratchBytes(const Problem& problem);

// Runs one call. Shapes must have been checked (clada/contract.h). `scratch` is 64-byte aligned and holds ScratchBytes().
// A row of y has the same bits for any number of threads and any other rows; a sequence's row of stat, for any other sequences.
// Memory stays within its bounds whatever the inputs' values are, also if they change meanwhile.
void RunSparseFFN(const Problem& problem, const Host& host, void* scratch);

}  // namespace clada

#endif  // CLADA_SPARSE_FFN_H_
