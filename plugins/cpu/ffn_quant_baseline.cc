// SPDX-License-Identifier: Apache-2.0
// Plain C++.
#include "quant_baseline.h"

#include "ffn_quant_body.h"

namespace {

struct BaselineFfn : Baseline {
  static constexpr bool kWideDot = true;

  static uint8_t ByteOf(int32_t word, int i) { return static_cast<uint8_t>(static_cast<uint32_t>(word) >> 8 * i); }

  template <int kWidth>
  static void Quad(const uint8_t* const* p, int64_t at, I (&out)[kWidth]) {
    for (int t = 0; t < kWidth; ++t)
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t byte = at + 4 * (kWidth * (lane / 4) + t) + lane % 4;
        uint32_t word = 0;
        for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(p[i][byte]) << 8 * i;
        out[t].lane[lane] = static_cast<int32_t>(word);
      }
  }
  template <class Value>
  static I EachInt(const Value& value) {
    I made;
    for (int j = 0; j < kLanes; ++j) made.lane[j] = value(j);
    return made;
  }
  template <int kBy>
  static I Shift(const I& value) {
    return EachInt([&](int j) {
      const auto bits = static_cast<uint32_t>(value.lane[j]);
      return static_cast<int32_t>(kBy > 0 ? bits << (kBy > 0 ? kBy : 0) : bits >> (kBy < 0 ? -kBy : 0));
    });
  }
  static I SetByte(int value) { return SetInt(static_cast<int32_t>(static_cast<uint32_t>(value) * 0x01010101u)); }
  static I And(const I& a, const I& b) {
    return EachInt([&](int j) { return a.lane[j] & b.lane[j]; });
  }
  static I Or(const I& a, const I& b) {
    return EachInt([&](int j) { return a.lane[j] | b.lane[j]; });
  }
  static I AddInt(const I& a, const I& b) {
    return EachInt([&](int j) { return a.lane[j] + b.lane[j]; });
  }
  static I Dot(const I& sum, const I& codes, int32_t x) {
    return EachInt([&](int j) {
      int32_t total = sum.lane[j];
      for (int i = 0; i < 4; ++i) total += ByteOf(codes.lane[j], i) * static_cast<int8_t>(ByteOf(x, i));
      return total;
    });
  }
  static void StoreInts(int32_t* p, const I& value) { __builtin_memcpy(p, value.lane, sizeof(value.lane)); }
  static F LoadFloats(const float* p, int count) {
    return Each([&](int j) { return j < count ? p[j] : 0.0f; });
  }
  static void StoreFloats(float* p, const F& value, int count) {
    for (int j = 0; j < count; ++j) p[j] = value.lane[j];
  }
  static F LoadHalves(const uint8_t* p, int count) {
    return Each([&](int j) { return j < count ? HalfOf(p[2 * j] | p[2 * j + 1] << 8) : 0.0f; });
  }
};

}  // namespace

const clada::quant::FfnKernels clada::quant::kBaselineFfnKernels = MakeFfnKernels<BaselineFfn>();
