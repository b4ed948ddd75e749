// SPDX-License-Identifier: Apache-2.0
// The launches, from the outside. Each enqueues on the stream and returns the launch's status.
#ifndef CLADA_CUDA_KERNELS_H_
#define CLADA_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include "plan.h"

namespace clada::cuda {

// rows.cu
// x of rows [first, first + rows) as the dot products read it; rows up to `padded` become 0.
cudaError_t LaunchSpreadX(const Problem& problem, int64_t first, int64_t rows, int64_t padded, float* x, cudaStream_t stream);
cudaError_t LaunchSpreadShadowX(const Problem& problem, int64_t first, int64_t rows, int64_t padded, float* x, float* sum,
                                cudaStream_t stream);
// x in the weights' type.
cudaError_t LaunchConvertX(const Problem& problem, int64_t first, int64_t rows, void* x, cudaStream_t stream);
cudaError_t LaunchPrior(const Problem& problem, const Prior& prior, cudaStream_t stream);
// stat := past_stat, or 0.
cudaError_t LaunchStartStat(const Problem& problem, cudaStream_t stream);
// energy [rows] of hidden [rows, f], for rows of the prompt: what the statistic divides h^2 by (1 with stat_norm `none`).
cudaError_t LaunchEnergy(const Problem& problem, int64_t first, int64_t rows, const float* hidden, float* energy,
                         cudaStream_t stream);
// stat += the prompt rows' shares, from hidden [rows, f], or null and the products pre [rows, f, n].
cudaError_t LaunchAddStat(const Problem& problem, int64_t first, int64_t rows, const float* hidden, const float* pre,
                          const float* energy, cudaStream_t stream);
// y of a prompt's panel from the last GEMM.
cudaError_t LaunchFinish(const Problem& problem, int64_t first, int64_t rows, const float* out, cudaStream_t stream);

// decode.cu: calls of up to kDecodeRows rows.
cudaError_t LaunchScores(const Problem& problem, const DecodePlan& plan, cudaStream_t stream);
cudaError_t LaunchSparseFFN(const Problem& problem, const DecodePlan& plan, cudaStream_t stream);
cudaError_t LaunchReduce(const Problem& problem, const DecodePlan& plan, cudaStream_t stream);
// score [rows, f] of a prompt's panel, for rows whose load is finite; score `shadow`.
cudaError_t LaunchShadowScores(const Problem& problem, const PromptPlan& plan, int64_t first, int64_t rows, cudaStream_t stream);

// select.cu
// mask [rows, E] from the plan's scores.
cudaError_t LaunchSelect(const Problem& problem, const DecodePlan& plan, cudaStream_t stream);
// hidden [rows, f] of a prompt's panel: activation, rule, mask.
cudaError_t LaunchPromptHidden(const Problem& problem, const PromptPlan& plan, int64_t first, int64_t rows, cudaStream_t stream);

// gemm.cu: the GEMM of clada::cuda::Gemm, without a library.
cudaError_t LaunchGemm(bool transpose_b, int64_t m, int64_t n, int64_t k, FloatType type, const void* a, const void* b, float* c,
                       cudaStream_t stream);

}  // namespace clada::cuda

#endif  // CLADA_CUDA_KERNELS_H_
