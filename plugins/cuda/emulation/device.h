// SPDX-License-Identifier: Apache-2.0
// CUDA's execution model on the CPU, as far as our kernels use it. The threads of a block are fibers of one OS thread that take
// turns at barriers and at warp-wide operations; blocks run one after the other. Slow, and the same numbers up to rounding.
#ifndef CLADA_CUDA_EMULATION_DEVICE_H_
#define CLADA_CUDA_EMULATION_DEVICE_H_

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline

#define __launch_bounds__(...)
// A block's fibers share an OS thread, so what is static in that thread is what the block shares.
#define __shared__ static thread_local
#define __restrict__

namespace clada::cuda {
namespace emulation {

struct Position {
  uint3 thread;
  uint3 block;
  dim3 block_size;
  dim3 grid_size;
};
const Position& Here();

// Returns when every thread of the block has called it.
void SyncBlock();
// Returns when every thread of the warp has called it. The last one to come calls `together` with all 32 arguments.
void SyncWarp(void* argument, void (*together)(void* const (&arguments)[32]));

cudaError_t Run(dim3 grid, dim3 block, const std::function<void()>& kernel);

}  // namespace emulation

#define threadIdx (::clada::cuda::emulation::Here().thread)
#define blockIdx (::clada::cuda::emulation::Here().block)
#define blockDim (::clada::cuda::emulation::Here().block_size)
#define gridDim (::clada::cuda::emulation::Here().grid_size)
#define __syncthreads() ::clada::cuda::emulation::SyncBlock()

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class... Parameters, class... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t, Arguments... arguments) {
  std::tuple<Parameters...> given(arguments...);
  return emulation::Run(grid, block, [&] { std::apply(kernel, given); });
}

float HalfToFloat(uint16_t bits);
uint16_t FloatToHalf(float value);
uint16_t FloatToBFloat(float value);

inline float ToFloat(float value) { return value; }
inline float ToFloat(Float16 value) { return HalfToFloat(value.bits); }
inline float ToFloat(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
template <class T>
T FromFloat(float value);
template <>
inline float FromFloat<float>(float value) { return value; }
template <>
inline Float16 FromFloat<Float16>(float value) { return {FloatToHalf(value)}; }
template <>
inline BFloat16 FromFloat<BFloat16>(float value) { return {FloatToBFloat(value)}; }

inline float BitsToFloat(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned FloatToBits(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float HalfBitsToFloat(uint16_t bits) { return HalfToFloat(bits); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int CountBits(unsigned word) { return __builtin_popcount(word); }
inline int LowestBit(unsigned word) { return __builtin_ctz(word); }

inline uint4 LoadOnce(const void* source) {
  uint4 value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}
template <class T>
void Unpack(const uint4& raw, const T*, float (&out)[8]) {
  T values[8];
  std::memcpy(values, &raw, sizeof(values));
  for (int i = 0; i < 8; ++i) out[i] = ToFloat(values[i]);
}
inline float ByteToFloat(unsigned bytes, int index) { return static_cast<float>((bytes >> (8 * index)) & 255u); }
inline float4 LoadFloat4(const float* source) {
  float4 value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}
template <class T, int kCount>
void WarpSum(T (&values)[kCount]) {
  emulation::SyncWarp(values, [](void* const (&lanes)[32]) {
    for (int i = 0; i < kCount; ++i) {
      T now[32], next[32];
      for (int lane = 0; lane < 32; ++lane) now[lane] = static_cast<const T*>(lanes[lane])[i];
      for (int offset = 16; offset > 0; offset /= 2) {
        for (int lane = 0; lane < 32; ++lane) next[lane] = now[lane] + now[lane ^ offset];
        std::memcpy(now, next, sizeof(now));
      }
      for (int lane = 0; lane < 32; ++lane) static_cast<T*>(lanes[lane])[i] = now[lane];
    }
  });
}
inline float WarpMax(float value) {
  emulation::SyncWarp(&value, [](void* const (&lanes)[32]) {
    float most = *static_cast<const float*>(lanes[0]);
    for (void* lane : lanes) most = std::fmax(most, *static_cast<const float*>(lane));
    for (void* lane : lanes) *static_cast<float*>(lane) = most;
  });
  return value;
}
inline unsigned Ballot(bool value) {
  unsigned word = value;
  emulation::SyncWarp(&word, [](void* const (&lanes)[32]) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= *static_cast<const unsigned*>(lanes[lane]) << lane;
    for (void* lane : lanes) *static_cast<unsigned*>(lane) = all;
  });
  return word;
}
inline void CountInShared(unsigned* counter) { ++*counter; }

// The first lane computes for its warp.
template <class T>
class Tile {
 public:
  void Add(const T* a, int a_stride, const T* b, int b_stride) {
    if (threadIdx.x % 32 != 0) return;
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j)
        for (int k = 0; k < 16; ++k) sum_[i][j] += ToFloat(a[i * a_stride + k]) * ToFloat(b[k * b_stride + j]);
  }
  void Store(float* target, int stride) const {
    if (threadIdx.x % 32 != 0) return;
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) target[i * stride + j] = sum_[i][j];
  }

 private:
  float sum_[16][16] = {};
};

}  // namespace clada::cuda

#endif  // CLADA_CUDA_EMULATION_DEVICE_H_
