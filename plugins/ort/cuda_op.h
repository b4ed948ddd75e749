// SPDX-License-Identifier: Apache-2.0
// The op for ONNX Runtime's CUDA provider: the schema of the CPU's, and the CUDA kernels on the provider's stream and memory.
#ifndef CLADA_ORT_CUDA_OP_H_
#define CLADA_ORT_CUDA_OP_H_

#include "quant_matmul_op.h"
#include "sparse_ffn_op.h"

namespace clada::ort {

struct SparseFFNCudaOp : SparseFFNOp {
  SparseFFNCudaOp();
};

// QuantMatMul has no CUDA kernel. The provider is offered one that refuses: without it, the runtime would leave the node to the CPU and
// copy its rows there and back in every call, and nothing would say so.
struct QuantMatMulCudaOp : QuantMatMulOp {
  QuantMatMulCudaOp();
};

// Of the CUDA runtime that is linked in, like "13.0".
std::string CudaVersion();

}  // namespace clada::ort

#endif  // CLADA_ORT_CUDA_OP_H_
