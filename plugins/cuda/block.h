// SPDX-License-Identifier: Apache-2.0
// What the threads of a block do together, and how kernels are launched for a type.
#ifndef CLADA_CUDA_BLOCK_H_
#define CLADA_CUDA_BLOCK_H_

#include <type_traits>

#include "device.h"
#include "plan.h"

namespace clada::cuda {

// The sum over the block, for every thread; always in the same order. All threads must come.
template <int kBlockWarps = kWarps, class T>
__device__ __forceinline__ T BlockSum(T value) {
  __shared__ T sums[kBlockWarps];
  T values[1] = {value};
  WarpSum(values);
  __syncthreads();  // an earlier call's sums have been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = values[0];
  __syncthreads();
  T total = sums[0];
  for (int i = 1; i < kBlockWarps; ++i) total += sums[i];
  return total;
}

__device__ __forceinline__ float BlockMax(float value) {
  __shared__ float most[kWarps];
  value = WarpMax(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) most[threadIdx.x / 32] = value;
  __syncthreads();
  float total = most[0];
  for (int i = 1; i < kWarps; ++i) total = fmaxf(total, most[i]);
  return total;
}

// How many threads before this one say yes; `total`: how many in all.
__device__ __forceinline__ int BlockCountBefore(bool yes, int* total) {
  __shared__ int counts[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned word = Ballot(yes);
  __syncthreads();
  if (lane == 0) counts[warp] = CountBits(word);
  __syncthreads();
  int before = CountBits(word & ((1u << lane) - 1u));
  *total = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += counts[i];
    *total += counts[i];
  }
  return before;
}

// Calls body with a null pointer of the type.
template <class Body>
cudaError_t WithType(FloatType type, const Body& body) {
  switch (type) {
    case FloatType::kFloat32: return body(static_cast<float*>(nullptr));
    case FloatType::kFloat16: return body(static_cast<Float16*>(nullptr));
    default: return body(static_cast<BFloat16*>(nullptr));
  }
}

inline dim3 Blocks(int64_t x, int64_t y = 1) { return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), 1); }

}  // namespace clada::cuda

#endif  // CLADA_CUDA_BLOCK_H_
