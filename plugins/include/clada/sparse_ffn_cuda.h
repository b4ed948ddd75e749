// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of com.clada::SparseFFN on raw device pointers: no framework, no allocation, no synchronisation.
//
// The problem is that of clada/sparse_ffn.h with every pointer in device memory. Nothing on the host depends on `load` or on any
// other data, so a call can be captured in a CUDA graph and replayed with other values.
#ifndef CLADA_SPARSE_FFN_CUDA_H_
#define CLADA_SPARSE_FFN_CUDA_H_

#include <string>

#include "clada/sparse_ffn.h"

struct CUstream_st;

namespace clada::cuda {

constexpr int64_t kDecodeRows = 16;  // calls with more rows are prompts: their products are GEMMs over all rows

// The GEMM of prompts: c[m, n] = a[m, k] * b, b being [k, n], or [n, k] when transposed; dense rows, a and b of `type`, c and the
// sums float32. Returns an empty text, or what went wrong.
struct Gemm {
  using Function = std::string (*)(void* host, CUstream_st* stream, bool transpose_b, int64_t m, int64_t n, int64_t k,
                                   FloatType type, const void* a, const void* b, float* c, void* workspace,
                                   size_t workspace_bytes);
  Function run = nullptr;  // null: the kernels' own
  void* host = nullptr;
  size_t workspace_bytes = 0;  // wanted by `run`
};

// cuBLASLt, opened when it is first asked for; its own kernels take over when the library is not there. One per process and
// thread-safe. `Name()` says which: "cuBLASLt 13.1.0", or "portable" with the reason in `Why()`.
const Gemm& DefaultGemm();
const std::string& DefaultGemmName();

// Bytes of device scratch memory for a call of these sizes. Looks at no pointer. Grows with the number of rows.
size_t WorkspaceBytes(const Problem& problem, const Gemm& gemm);

// Enqueues one call. Shapes must have been checked (clada/contract.h), and be within CheckLimits. `workspace` is 256-byte aligned.
// The same inputs give the same bits, whatever ran before. A call with no rows does nothing but copy the statistic.
//
// Returns an empty text, or what went wrong: the CUDA error's name and the step.
std::string RunSparseFFN(const Problem& problem, const Gemm& gemm, void* workspace, CUstream_st* stream);

// An empty text, or the size that the kernels can't index (more than 2^31 - 1 elements of a row of w_in, rows, or weights), with
// the value found.
std::string CheckLimits(const Problem& problem);

}  // namespace clada::cuda

#endif  // CLADA_SPARSE_FFN_CUDA_H_
