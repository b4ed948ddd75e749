// SPDX-License-Identifier: Apache-2.0
// The kernels of quant_kernels.h, written once over a vector type V: its vectors I and F have a row of the matrix in each of kLanes
// 32-bit lanes, so no sum runs across lanes. Each instruction set includes this in a file of its own.
//
// V::Sums<bits, rows>(record, x, stride, sum) adds to sum[r] the products of a block's codes with row r of x, `stride` numbers apart.
// Where V has a dot product of unsigned with signed bytes, that is DotSums.
#ifndef CLADA_CPU_QUANT_BODY_H_
#define CLADA_CPU_QUANT_BODY_H_

#include "quant_kernels.h"

namespace {

using clada::quant::kBlock;
using clada::quant::kHighBits;
using clada::quant::kHighBytes;
using clada::quant::kStep;
using clada::quant::kTileRows;
using clada::quant::LowBytes;
using clada::quant::RecordBytes;
using clada::quant::XRows;

constexpr int64_t kRun = kTileRows * kStep;  // bytes of a plane's run
constexpr int kSteps = kBlock / kStep;
constexpr int64_t kLine = 64;
// Bytes ahead. A core has few misses of its first cache in flight and more of its second, so lines come into the second first. Of 2 to
// 32 KB far ahead 4 is best, from memory: by a tenth over no second prefetch.
constexpr int64_t kPrefetchNear = 1024, kPrefetchFar = 4096;
constexpr uint32_t kInfinity = 0x7f800000, kQuietNan = 0x7fc00000;

inline float FloatOf(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// The weights of a step of x, as the bits of one lane.
inline int32_t StepOf(const int8_t* x, int step) {
  int32_t bits;
  __builtin_memcpy(&bits, x + step * kStep, sizeof(bits));
  return bits;
}

// What a block's sum begins with: -zero times the sum of x. Unsigned, so that an x that changes while it is rounded can't overflow.
template <int kBits>
inline int32_t ZeroShare(int32_t sum) {
  return static_cast<int32_t>(static_cast<uint32_t>(sum) * (0u - (1u << (kBits - 1))));
}

// The codes of a step, a byte each: step `kStepAt` of the record whose planes begin at `high` and `low`.
template <class V, int kBits, int kStepAt>
inline typename V::I Codes(const uint8_t* high, const uint8_t* low) {
  constexpr int kLow = kBits - kHighBits, kPerHigh = 8 / kHighBits;
  constexpr int kShift = kLow - kHighBits * (kStepAt % kPerHigh);  // brings the nibble to its place in the code
  const typename V::I nibbles = V::template Shift<kShift>(V::LoadBytes(high + kStepAt / kPerHigh * kRun));
  if constexpr (kLow == 0) {
    (void)low;
    return V::And(nibbles, V::SetByte(0x0f));
  } else {
    constexpr int kPerLow = 8 / kLow;
    const typename V::I rest = V::template Shift<-kLow * (kStepAt % kPerLow)>(V::LoadBytes(low + kStepAt / kPerLow * kRun));
    return V::Or(V::And(nibbles, V::SetByte(0x0f << kLow)), V::And(rest, V::SetByte((1 << kLow) - 1)));
  }
}

template <class V, int kBits, int kRows, int kStepAt = 0>
inline void DotSums(const uint8_t* high, const uint8_t* low, const int8_t* x, int64_t stride, typename V::I (&sum)[kRows]) {
  if constexpr (kStepAt < kSteps) {
    const typename V::I codes = Codes<V, kBits, kStepAt>(high, low);
    for (int r = 0; r < kRows; ++r) sum[r] = V::Dot(sum[r], codes, StepOf(x + r * stride, kStepAt));
    DotSums<V, kBits, kRows, kStepAt + 1>(high, low, x, stride, sum);
  }
}

// Of a record that is read later. Runs beyond the tile into the next, and beyond the last one into nothing: a prefetch reads no memory.
template <int64_t kBytes>
inline void Prefetch(const uint8_t* record) {
  const auto at = reinterpret_cast<uintptr_t>(record);
  for (int64_t line = 0; line < kBytes; line += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(at + kPrefetchNear + line), 0, 3);
    __builtin_prefetch(reinterpret_cast<const void*>(at + kPrefetchFar + line), 0, 2);
  }
}

// A run of rows over all blocks of a tile.
template <class V, int kBits, bool kOffset, int kRows>
void TileRun(const uint8_t* tile, const XRows& x, int64_t first, float* out) {
  constexpr int kGroups = kTileRows / V::kLanes;
  constexpr int64_t kRecord = RecordBytes(kBits, kOffset), kScales = kHighBytes + LowBytes(kBits);
  typename V::F total[kGroups][kRows];
  for (int g = 0; g < kGroups; ++g)
    for (int r = 0; r < kRows; ++r) total[g][r] = V::Set(0.0f);
  const int64_t stride = x.blocks * kBlock;
  const int8_t* q = x.q + first * stride;
  const float* scale = x.scale + first * x.blocks;
  const int32_t* sums = x.sum + first * x.blocks;
  const uint8_t* record = tile;
  for (int64_t b = 0; b < x.blocks; ++b, record += kRecord, q += kBlock) {
    Prefetch<kRecord>(record);
    for (int g = 0; g < kGroups; ++g) {
      const uint8_t* high = record + g * V::kLanes * kStep;
      typename V::I sum[kRows];
      for (int r = 0; r < kRows; ++r) sum[r] = V::SetInt(ZeroShare<kBits>(sums[r * x.blocks + b]));
      V::template Sums<kBits, kRows>(high, high + kHighBytes, q, stride, sum);
      const typename V::F weights = V::LoadHalf(record + kScales + g * V::kLanes * 2);
      for (int r = 0; r < kRows; ++r)
        total[g][r] = V::Fma(V::ToFloat(sum[r]), V::Mul(V::Set(scale[r * x.blocks + b]), weights), total[g][r]);
      if constexpr (kOffset) {
        const typename V::F offsets = V::LoadHalf(record + kScales + clada::quant::kScaleBytes + g * V::kLanes * 2);
        for (int r = 0; r < kRows; ++r) {
          const typename V::F of_block = V::Set(static_cast<float>(sums[r * x.blocks + b]));
          total[g][r] = V::Fma(of_block, V::Mul(V::Set(scale[r * x.blocks + b]), offsets), total[g][r]);
        }
      }
    }
  }
  for (int g = 0; g < kGroups; ++g)
    for (int r = 0; r < kRows; ++r) V::Store(out + (first + r) * kTileRows + g * V::kLanes, total[g][r]);
}

// Runs of 8 rows, then of 4, 2 and 1: the first reads the tile from memory, the others from a cache.
template <class V, int kBits, bool kOffset, int kMost = 8>
void TileFrom(const uint8_t* tile, const XRows& x, int64_t first, int64_t rows, float* out) {
  for (; first + kMost <= rows; first += kMost) TileRun<V, kBits, kOffset, kMost>(tile, x, first, out);
  if constexpr (kMost > 1) TileFrom<V, kBits, kOffset, kMost / 2>(tile, x, first, rows, out);
}

template <class V, int kBits, bool kOffset>
void Tile(const uint8_t* tile, const XRows& x, int64_t rows, float* out) {
  TileFrom<V, kBits, kOffset>(tile, x, 0, rows, out);
}

template <class V>
void Quantise(const float* x, int64_t blocks, int8_t* q, float* scale, int32_t* sum) {
  // 2^kLeastExponent
  const float least = FloatOf(static_cast<uint32_t>(clada::quant::kLeastExponent + 127) << 23);
  for (int64_t b = 0; b < blocks; ++b, x += kBlock, q += kBlock) {
    // As integers, magnitudes are in the order of their values, with infinities and NaN above them all.
    const uint32_t bits = V::LargestMagnitude(x);
    const float largest = FloatOf(bits);
    if (bits >= kInfinity || largest < least) {
      __builtin_memset(q, 0, kBlock);
      scale[b] = bits >= kInfinity ? FloatOf(kQuietNan) : 0.0f;
      sum[b] = 0;
      continue;
    }
    scale[b] = largest / 127.0f;
    sum[b] = V::Round(x, 127.0f / largest, q);
  }
}

template <class V, int kFormat>
constexpr auto TileOf(bool has_offset) {
  constexpr int kBits = clada::quant::kFormatBits[kFormat];
  return has_offset ? Tile<V, kBits, true> : Tile<V, kBits, false>;
}

template <class V>
constexpr clada::quant::Kernels MakeKernels(const char* name) {
  static_assert(clada::quant::kFormats == 4, "a line each");
  return {name,
          8,
          Quantise<V>,
          {{TileOf<V, 0>(false), TileOf<V, 0>(true)},
           {TileOf<V, 1>(false), TileOf<V, 1>(true)},
           {TileOf<V, 2>(false), TileOf<V, 2>(true)},
           {TileOf<V, 3>(false), TileOf<V, 3>(true)}}};
}

}  // namespace

#endif  // CLADA_CPU_QUANT_BODY_H_
