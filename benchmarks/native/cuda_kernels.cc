// SPDX-License-Identifier: Apache-2.0
// A C interface to the CUDA kernels for programs that time them (benchmarks/cuda_kernels.py), without a runtime between.
#include <cstdio>

#include "clada/sparse_ffn_cuda.h"

#define CLADA_EXPORT extern "C" __attribute__((visibility("default")))

using clada::cuda::DefaultGemm;

// The caller declares the struct again; equal sizes are the least that must hold.
CLADA_EXPORT size_t clada_problem_bytes() { return sizeof(clada::Problem); }

CLADA_EXPORT const char* clada_gemm_name() { return clada::cuda::DefaultGemmName().c_str(); }

CLADA_EXPORT size_t clada_workspace_bytes(const clada::Problem* problem) {
  return clada::cuda::WorkspaceBytes(*problem, DefaultGemm());
}

// 0, or 1 with the error's text.
CLADA_EXPORT int clada_run(const clada::Problem* problem, void* workspace, void* stream, char* error, size_t error_bytes) {
  std::string said = clada::cuda::CheckLimits(*problem);
  if (said.empty()) said = clada::cuda::RunSparseFFN(*problem, DefaultGemm(), workspace, static_cast<CUstream_st*>(stream));
  std::snprintf(error, error_bytes, "%s", said.c_str());
  return said.empty() ? 0 : 1;
}
