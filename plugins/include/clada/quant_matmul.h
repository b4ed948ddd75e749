// SPDX-License-Identifier: Apache-2.0
// The kernel of com.clada::QuantMatMul on raw pointers, and what a node of it may look like: no framework, no allocation in a
// call, no threads of its own.
//
// docs/quant-matmul-op.md is the contract. Notation: K and N columns and rows of the matrix, B = K / 32 blocks, T tiles of 32 rows.
#ifndef CLADA_QUANT_MATMUL_H_
#define CLADA_QUANT_MATMUL_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "clada/contract.h"
#include "clada/quant_matmul_tables.h"
#include "clada/sparse_ffn.h"

namespace clada::quant {

// One call. Pointers need no alignment beyond their element's; a weight at a 64-byte boundary is read faster.
struct Problem {
  Attributes attributes;
  int64_t rows = 0;
  int64_t in_features = 0;          // K
  const float* x = nullptr;         // [rows, K]
  const uint8_t* weight = nullptr;  // [T, B, RecordBytes]
  const float* bias = nullptr;      // [N], with has_bias
  float* y = nullptr;               // [rows, N]

  int64_t blocks() const { return in_features / kBlock; }
  int64_t tiles() const { return (attributes.out_features + kTileRows - 1) / kTileRows; }
};

// Reads and checks all attributes. Throws ContractError.
Attributes ReadAttributes(const std::string& node, const AttributeReader& reader);

// Throws ContractError when a node has other numbers of inputs or outputs than its attributes want.
void CheckCounts(const std::string& node, const Attributes& attributes, size_t inputs, size_t outputs);

// Checks types and shapes and fills a problem but y. Throws ContractError.
Problem MakeProblem(const std::string& node, const Attributes& attributes, const std::vector<TensorView>& inputs);

// Gives a problem whose weight is known other rows: checks x's type and shape. Throws ContractError.
void SetRows(const std::string& node, const TensorView& x, Problem* problem);

// The shape of y; `x` is that of the input x.
std::vector<int64_t> OutputShape(const Attributes& attributes, const std::vector<int64_t>& x);

// The kernels for an instruction set, or the best that this machine has when `name` is null or empty. Null when
// it is unknown or the machine lacks it.
struct Kernels;
const Kernels* FindKernels(const char* name);
const char* KernelsName(const Kernels* kernels);

// Bytes of scratch memory that a call of these sizes needs. Looks at no pointer.
size_t ScratchBytes(const Problem& problem);

// Runs one call. `scratch` is 64-byte aligned and holds ScratchBytes(). A row of y has the same bits on every instruction set, for any
// number of threads and any other rows. Memory stays within its bounds whatever the inputs' values are.
void Run(const Problem& problem, const ParallelFor& parallel_for, const Kernels& kernels, void* scratch);

}  // namespace clada::quant

#endif  // CLADA_QUANT_MATMUL_H_
