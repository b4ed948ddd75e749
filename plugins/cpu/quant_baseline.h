// SPDX-License-Identifier: Apache-2.0
// Vectors in plain C++.
#ifndef CLADA_CPU_QUANT_BASELINE_H_
#define CLADA_CPU_QUANT_BASELINE_H_

#include <cmath>

#include "quant_body.h"

namespace {

struct Baseline {
  static constexpr int kLanes = 8;
  struct I {
    int32_t lane[kLanes];
  };
  struct F {
    float lane[kLanes];
  };

  template <int kWidth>
  static int32_t ValueAt(const uint8_t* plane, int step, int byte) {
    if constexpr (kWidth == 0) {
      return 0;
    } else {
      constexpr int kPer = 8 / kWidth;
      return plane[step / kPer * kRun + byte] >> kWidth * (step % kPer) & ((1 << kWidth) - 1);
    }
  }
  template <int kBits, int kRows>
  static void Sums(const uint8_t* high, const uint8_t* low, const int8_t* x, int64_t stride, I (&sum)[kRows]) {
    constexpr int kLow = kBits - kHighBits;
    for (int step = 0; step < kSteps; ++step) {
      int32_t codes[kLanes * kStep];
      for (int i = 0; i < kLanes * kStep; ++i) codes[i] = ValueAt<kHighBits>(high, step, i) << kLow | ValueAt<kLow>(low, step, i);
      for (int r = 0; r < kRows; ++r) {
        const int8_t* values = x + r * stride + step * kStep;
        for (int j = 0; j < kLanes; ++j)
          for (int i = 0; i < kStep; ++i) sum[r].lane[j] += codes[j * kStep + i] * values[i];
      }
    }
  }

  template <class Value>
  static F Each(const Value& value) {
    F made;
    for (int j = 0; j < kLanes; ++j) made.lane[j] = value(j);
    return made;
  }
  static I SetInt(int32_t value) {
    I made;
    for (int32_t& lane : made.lane) lane = value;
    return made;
  }
  static F Set(float value) {
    return Each([&](int) { return value; });
  }
  static F ToFloat(const I& value) {
    return Each([&](int j) { return static_cast<float>(value.lane[j]); });
  }
  static F Mul(const F& a, const F& b) {
    return Each([&](int j) { return a.lane[j] * b.lane[j]; });
  }
  // Rounded once, in software where the machine has no instruction for it: the bits are those of the other kernels.
  static F Fma(const F& a, const F& b, const F& c) {
    return Each([&](int j) { return std::fma(a.lane[j], b.lane[j], c.lane[j]); });
  }
  static F LoadHalf(const uint8_t* p) {
    return Each([&](int j) { return HalfOf(p[2 * j] | p[2 * j + 1] << 8); });
  }
  static float HalfOf(int bits) {
    const int exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
    const uint32_t sign = static_cast<uint32_t>(bits >> 15) << 31;
    if (exponent == 0x1f) return FloatOf(sign | kInfinity | static_cast<uint32_t>(mantissa) << 13 | (mantissa ? 1u << 22 : 0u));
    if (exponent != 0) return FloatOf(sign | static_cast<uint32_t>(exponent + 112) << 23 | static_cast<uint32_t>(mantissa) << 13);
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  static void Store(float* p, const F& value) { __builtin_memcpy(p, value.lane, sizeof(value.lane)); }

  static uint32_t LargestMagnitude(const float* x) {
    uint32_t most = 0;
    for (int i = 0; i < kBlock; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, x + i, sizeof(bits));
      bits &= 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    return most;
  }
  // q = x * inverse, rounded to the nearest; their sum. Adding 1.5 * 2^23 leaves no place for a fraction, and the sum is rounded as
  // all sums are: halves to even.
  static int32_t Round(const float* x, float inverse, int8_t* q) {
    uint32_t sum = 0;
    for (int i = 0; i < kBlock; ++i) {
      const float shifted = x[i] * inverse + 12582912.0f;
      uint32_t bits;
      __builtin_memcpy(&bits, &shifted, sizeof(bits));
      q[i] = static_cast<int8_t>(bits & 0xff);  // 12582912 ends in zeros
      sum += static_cast<uint32_t>(q[i]);
    }
    return static_cast<int32_t>(sum);
  }
};

}  // namespace

#endif  // CLADA_CPU_QUANT_BASELINE_H_
