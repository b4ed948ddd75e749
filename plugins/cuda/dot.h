// SPDX-License-Identifier: Apache-2.0
// Dot products of weight rows with up to 16 rows of x, by one warp.
//
// x is spread out (rows.cu) so that lanes which read 16 bytes of weights find their x in 16-byte pieces side by side: see XIndex.
#ifndef CLADA_CUDA_DOT_H_
#define CLADA_CUDA_DOT_H_

#include "device.h"
#include "plan.h"

namespace clada::cuda {

// Where element i of a row of x lies. Lane l multiplies 8 weights of a chunk of 256: for 16-bit weights 8l .. 8l + 7 (16 bytes),
// for float32 weights 4l .. 4l + 3 and 128 + 4l .. 128 + 4l + 3 (twice 16 bytes), which is the natural order.
__device__ __forceinline__ int64_t XIndex(int64_t i, bool wide) {
  if (wide) return i;
  const int64_t chunk = i / kWarpWeights, at = i % kWarpWeights;
  return chunk * kWarpWeights + at % 8 / 4 * 128 + at / 8 * 4 + at % 4;
}

// Where weight i of a row lies for the 4-bit shadow: lane l multiplies block l of 32 weights of a chunk of 1024.
__device__ __forceinline__ int64_t ShadowIndex(int64_t i) {
  const int64_t chunk = i / kShadowWeights, at = i % kShadowWeights;
  return chunk * kShadowWeights + at % kShadowBlock / 4 * 128 + at / kShadowBlock * 4 + at % 4;
}

template <class W>
struct IsWide {
  static constexpr bool value = sizeof(W) == 4;
};

// Eight weights of a lane, from element `at` (a multiple of 256) of a row that goes on for 256 elements, in 16-byte pieces.
template <class W>
__device__ __forceinline__ void LoadWeights(const W* row, int at, int lane, float (&w)[8]) {
  if constexpr (IsWide<W>::value) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 raw = LoadOnce(row + at + half * 128 + lane * 4);
      w[half * 4] = BitsToFloat(raw.x), w[half * 4 + 1] = BitsToFloat(raw.y);
      w[half * 4 + 2] = BitsToFloat(raw.z), w[half * 4 + 3] = BitsToFloat(raw.w);
    }
  } else {
    Unpack(LoadOnce(row + at + lane * 8), row, w);
  }
}

// The same one by one, 0 beyond the row's end.
template <class W>
__device__ __forceinline__ void LoadWeightsOneByOne(const W* row, int at, int lane, int d, float (&w)[8]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const int i = at + (IsWide<W>::value ? k / 4 * 128 + lane * 4 + k % 4 : lane * 8 + k);
    w[k] = i < d ? ToFloat(row[i]) : 0.0f;
  }
}

template <int kProjections, int kRows>
__device__ __forceinline__ void MultiplyAdd(const float (&w)[kProjections][8], const float* x, int64_t stride,
                                            float (&sum)[kProjections][kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 v = LoadFloat4(x + r * stride + half * 128);
#pragma unroll
      for (int p = 0; p < kProjections; ++p) {
        float& s = sum[p][r];
        s += w[p][half * 4] * v.x;
        s += w[p][half * 4 + 1] * v.y;
        s += w[p][half * 4 + 2] * v.z;
        s += w[p][half * 4 + 3] * v.w;
      }
    }
}

// sum[p][r] = row p of the weights times row r of x, p < kProjections; every lane gets all sums.
// `vector`: rows begin at multiples of 16 bytes.
template <class W, int kProjections, int kRows>
__device__ __forceinline__ void Dot(const W* weights, int d, bool vector, const float* x, float (&sum)[kProjections][kRows]) {
  const int lane = threadIdx.x % 32;
  const int64_t stride = RoundUp(d, kWarpWeights);
#pragma unroll
  for (int p = 0; p < kProjections; ++p)
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[p][r] = 0.0f;
  float w[kProjections][8];
  const int whole = vector ? d / kWarpWeights * kWarpWeights : 0;
  // Several chunks are in flight at once: the loads of a memory-bound kernel have to overlap.
#pragma unroll kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1
  for (int at = 0; at < whole; at += kWarpWeights) {
#pragma unroll
    for (int p = 0; p < kProjections; ++p) LoadWeights(weights + static_cast<int64_t>(p) * d, at, lane, w[p]);
    MultiplyAdd(w, x + at + lane * 4, stride, sum);
  }
#pragma unroll 1
  for (int at = whole; at < d; at += kWarpWeights) {
#pragma unroll
    for (int p = 0; p < kProjections; ++p) LoadWeightsOneByOne(weights + static_cast<int64_t>(p) * d, at, lane, d, w[p]);
    MultiplyAdd(w, x + at + lane * 4, stride, sum);
  }
#pragma unroll
  for (int p = 0; p < kProjections; ++p) WarpSum(sum[p]);
}

// The same from the 4-bit copy: a block stands for offset + scale * q, so its product with x is offset * sum(x) + scale * sum(q x).
// `shadow` is [p, d / 2] and `scale` [p, d / 32, 2]; `aligned`: the shadow's rows begin at multiples of 16 bytes.
template <int kProjections, int kRows>
__device__ __forceinline__ void ShadowDot(const uint8_t* shadow, const uint16_t* scale, int d, bool aligned, const float* x,
                                          const float* x_sum, float (&sum)[kProjections][kRows]) {
  const int lane = threadIdx.x % 32, blocks = d / kShadowBlock;
  const int64_t stride = RoundUp(d, kShadowWeights);
#pragma unroll
  for (int p = 0; p < kProjections; ++p)
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[p][r] = 0.0f;
#pragma unroll 1
  for (int at = 0; at < blocks; at += 32) {
    const int block = at + lane;
    unsigned q[kProjections][4] = {};
    float step[kProjections] = {}, offset[kProjections] = {};
    if (block < blocks) {
#pragma unroll
      for (int p = 0; p < kProjections; ++p) {
        const uint8_t* source = shadow + static_cast<int64_t>(p) * (d / 2) + block * 16;
        if (aligned) {
          const uint4 raw = LoadOnce(source);
          q[p][0] = raw.x, q[p][1] = raw.y, q[p][2] = raw.z, q[p][3] = raw.w;
        } else {
#pragma unroll
          for (int i = 0; i < 16; ++i) q[p][i / 4] |= static_cast<unsigned>(source[i]) << (8 * (i % 4));
        }
        const uint16_t* pair = scale + (static_cast<int64_t>(p) * blocks + block) * 2;
        step[p] = HalfBitsToFloat(pair[0]), offset[p] = HalfBitsToFloat(pair[1]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float product[kProjections] = {};
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float4 v = LoadFloat4(x + r * stride + at * kShadowBlock + k * 128 + lane * 4);
#pragma unroll
        for (int p = 0; p < kProjections; ++p) {
          const unsigned bytes = (k < 4 ? q[p][k % 4] : q[p][k % 4] >> 4) & 0x0f0f0f0fu;
          product[p] += ByteToFloat(bytes, 0) * v.x;
          product[p] += ByteToFloat(bytes, 1) * v.y;
          product[p] += ByteToFloat(bytes, 2) * v.z;
          product[p] += ByteToFloat(bytes, 3) * v.w;
        }
      }
      const float total = x_sum[r * (stride / kShadowBlock) + block];  // padded with zeros, as x is
#pragma unroll
      for (int p = 0; p < kProjections; ++p) sum[p][r] += offset[p] * total + step[p] * product[p];
    }
  }
#pragma unroll
  for (int p = 0; p < kProjections; ++p) WarpSum(sum[p]);
}

// After a dot product every lane has the sums of all rows. From there lane r goes on for row r, so that the formulas that follow
// run side by side.
struct Pair {
  float value[2];
};

template <int kRows>
__device__ __forceinline__ float OfLane(const float (&sum)[kRows]) {
  const int lane = threadIdx.x % 32;
  float mine = sum[0];
#pragma unroll
  for (int r = 1; r < kRows; ++r)
    if (lane == r) mine = sum[r];
  return mine;
}

template <class W, int kProjections, int kRows>
__device__ __forceinline__ Pair DotOfLane(const W* weights, int d, bool vector, const float* x) {
  float sum[kProjections][kRows];
  Dot<W>(weights, d, vector, x, sum);
  return {{OfLane(sum[0]), kProjections == 2 ? OfLane(sum[kProjections - 1]) : 0.0f}};
}

template <int kProjections, int kRows>
__device__ __forceinline__ Pair ShadowDotOfLane(const uint8_t* shadow, const uint16_t* scale, int d, bool aligned, const float* x,
                                             const float* x_sum) {
  float sum[kProjections][kRows];
  ShadowDot(shadow, scale, d, aligned, x, x_sum, sum);
  return {{OfLane(sum[0]), kProjections == 2 ? OfLane(sum[kProjections - 1]) : 0.0f}};
}

}  // namespace clada::cuda

#endif  // CLADA_CUDA_DOT_H_
