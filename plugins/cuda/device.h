// SPDX-License-Identifier: Apache-2.0
// What the kernels use of CUDA, under names of our own: launching, 16-bit numbers, loads, and what a warp does together.
// With CLADA_CUDA_EMULATION the same kernels are compiled as host code and run on the CPU (emulation/device.h), so that their
// numbers are tested where there is no GPU.
#ifndef CLADA_CUDA_DEVICE_H_
#define CLADA_CUDA_DEVICE_H_

#include <cstdint>

#ifdef CLADA_CUDA_EMULATION
#include "emulation/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

namespace clada::cuda {

using Float16 = __half;
using BFloat16 = __nv_bfloat16;

constexpr unsigned kWholeWarp = 0xffffffffu;

template <class... Parameters, class... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

__device__ __forceinline__ float ToFloat(float value) { return value; }
__device__ __forceinline__ float ToFloat(Float16 value) { return __half2float(value); }
__device__ __forceinline__ float ToFloat(BFloat16 value) { return __bfloat162float(value); }
template <class T>
__device__ __forceinline__ T FromFloat(float value);
template <>
__device__ __forceinline__ float FromFloat<float>(float value) { return value; }
template <>
__device__ __forceinline__ Float16 FromFloat<Float16>(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ BFloat16 FromFloat<BFloat16>(float value) { return __float2bfloat16_rn(value); }

__device__ __forceinline__ float BitsToFloat(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ unsigned FloatToBits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float HalfBitsToFloat(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ int CountBits(unsigned word) { return __popc(word); }
__device__ __forceinline__ int LowestBit(unsigned word) { return __ffs(static_cast<int>(word)) - 1; }

// 16 bytes that are read once: they need no place in the L1 cache, which is left to x.
__device__ __forceinline__ uint4 LoadOnce(const void* source) {
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(source));
  return value;
}

// Eight neighbouring weights out of 16 bytes, or four out of 16 (float).
__device__ __forceinline__ void Unpack(const uint4& raw, const Float16*, float (&out)[8]) {
  const __half2* pairs = reinterpret_cast<const __half2*>(&raw);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(pairs[i]);
    out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
  }
}
__device__ __forceinline__ void Unpack(const uint4& raw, const BFloat16*, float (&out)[8]) {
  // bfloat16 is the upper half of a float32.
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

// Byte `index` of four, as a float: exact, and cheaper than a conversion.
__device__ __forceinline__ float ByteToFloat(unsigned bytes, int index) {
  return __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440u | static_cast<unsigned>(index))) - 8388608.0f;
}

__device__ __forceinline__ float4 LoadFloat4(const float* source) { return __ldg(reinterpret_cast<const float4*>(source)); }

// Every lane gets the sum over the warp, of each of the values.
template <class T, int kCount>
__device__ __forceinline__ void WarpSum(T (&values)[kCount]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kWholeWarp, values[i], offset);
}
__device__ __forceinline__ float WarpMax(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, offset));
  return value;
}
// One bit a lane.
__device__ __forceinline__ unsigned Ballot(bool value) { return __ballot_sync(kWholeWarp, value); }

__device__ __forceinline__ void CountInShared(unsigned* counter) { atomicAdd(counter, 1u); }

// A 16 x 16 x 16 product on the tensor cores, by one warp: sum += a * b. Tiles lie in shared memory, `stride` elements a row.
template <class T>
class Tile {
 public:
  __device__ Tile() { nvcuda::wmma::fill_fragment(sum_, 0.0f); }
  __device__ void Add(const T* a, int a_stride, const T* b, int b_stride) {
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, T, nvcuda::wmma::row_major> left;
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, T, nvcuda::wmma::row_major> right;
    nvcuda::wmma::load_matrix_sync(left, a, a_stride);
    nvcuda::wmma::load_matrix_sync(right, b, b_stride);
    nvcuda::wmma::mma_sync(sum_, left, right, sum_);
  }
  __device__ void Store(float* target, int stride) const {
    nvcuda::wmma::store_matrix_sync(target, sum_, stride, nvcuda::wmma::mem_row_major);
  }

 private:
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum_;
};

}  // namespace clada::cuda

#endif  // CLADA_CUDA_EMULATION
#endif  // CLADA_CUDA_DEVICE_H_
