// SPDX-License-Identifier: Apache-2.0
// The prompt's GEMM where cuBLASLt is not at hand: plain tiles through shared memory, on the tensor cores for 16-bit types.
// Correct everywhere, and not tuned.
#include "block.h"
#include "kernels.h"

namespace clada::cuda {
namespace {

constexpr int kTile = 64;  // rows and columns of c that a block computes

// c[m, n] = a[m, k] * b. A block has 8 warps: four times 16 rows, twice 32 columns.
template <class T>
__global__ void __launch_bounds__(kThreads)
    TensorGemmKernel(bool transpose_b, int64_t m, int64_t n, int64_t k, const T* a, const T* b, float* c) {
  constexpr int kStep = 32, kPadding = 8;
  __shared__ __align__(32) T left[kTile][kStep + kPadding];
  __shared__ __align__(32) T right[kStep][kTile + kPadding];
  __shared__ __align__(32) float out[kTile][kTile + 4];
  const int warp = threadIdx.x / 32, row = warp / 2 * 16, column = warp % 2 * 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTile, column0 = static_cast<int64_t>(blockIdx.x) * kTile;
  Tile<T> sums[2];
  for (int64_t k0 = 0; k0 < k; k0 += kStep) {
    for (int at = threadIdx.x; at < kTile * kStep; at += kThreads) {
      const int i = at / kStep, j = at % kStep;
      left[i][j] = row0 + i < m && k0 + j < k ? a[(row0 + i) * k + k0 + j] : FromFloat<T>(0.0f);
    }
    for (int at = threadIdx.x; at < kTile * kStep; at += kThreads) {
      // Neighbouring threads read neighbouring elements, whichever way b lies.
      const int i = transpose_b ? at % kStep : at / kTile, j = transpose_b ? at / kStep : at % kTile;
      const bool there = k0 + i < k && column0 + j < n;
      right[i][j] = there ? b[transpose_b ? (column0 + j) * k + k0 + i : (k0 + i) * n + column0 + j] : FromFloat<T>(0.0f);
    }
    __syncthreads();
    for (int step = 0; step < kStep; step += 16)
      for (int t = 0; t < 2; ++t)
        sums[t].Add(&left[row][step], kStep + kPadding, &right[step][column + 16 * t], kTile + kPadding);
    __syncthreads();
  }
  for (int t = 0; t < 2; ++t) sums[t].Store(&out[row][column + 16 * t], kTile + 4);
  __syncthreads();
  for (int at = threadIdx.x; at < kTile * kTile; at += kThreads) {
    const int i = at / kTile, j = at % kTile;
    if (row0 + i < m && column0 + j < n) c[(row0 + i) * n + column0 + j] = out[i][j];
  }
}

// The same for float32, without rounding to TF32: 4 x 4 elements of c a thread.
__global__ void __launch_bounds__(kThreads)
    FloatGemmKernel(bool transpose_b, int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c) {
  constexpr int kStep = 16, kPadding = 4;
  __shared__ float left[kStep][kTile + kPadding];
  __shared__ float right[kStep][kTile + kPadding];
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTile, column0 = static_cast<int64_t>(blockIdx.x) * kTile;
  float sum[4][4] = {};
  for (int64_t k0 = 0; k0 < k; k0 += kStep) {
    for (int at = threadIdx.x; at < kTile * kStep; at += kThreads) {
      const int i = at / kStep, j = at % kStep;
      left[j][i] = row0 + i < m && k0 + j < k ? a[(row0 + i) * k + k0 + j] : 0.0f;
    }
    for (int at = threadIdx.x; at < kTile * kStep; at += kThreads) {
      const int i = transpose_b ? at % kStep : at / kTile, j = transpose_b ? at / kStep : at % kTile;
      const bool there = k0 + i < k && column0 + j < n;
      right[i][j] = there ? b[transpose_b ? (column0 + j) * k + k0 + i : (k0 + i) * n + column0 + j] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kStep; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += left[step][row + i] * right[step][column + j];
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j)
      if (row0 + row + i < m && column0 + column + j < n) c[(row0 + row + i) * n + column0 + column + j] = sum[i][j];
}

}  // namespace

cudaError_t LaunchGemm(bool transpose_b, int64_t m, int64_t n, int64_t k, FloatType type, const void* a, const void* b, float* c,
                       cudaStream_t stream) {
  const dim3 grid = Blocks(CeilDiv(n, kTile), CeilDiv(m, kTile));
  return WithType(type, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    const T* left = static_cast<const T*>(a);
    const T* right = static_cast<const T*>(b);
    if constexpr (sizeof(T) == 4)
      return Launch(&FloatGemmKernel, grid, dim3(kThreads), stream, transpose_b, m, n, k, left, right, c);
    else
      return Launch(&TensorGemmKernel<T>, grid, dim3(kThreads), stream, transpose_b, m, n, k, left, right, c);
  });
}

}  // namespace clada::cuda
