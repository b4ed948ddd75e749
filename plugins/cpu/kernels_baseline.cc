// SPDX-License-Identifier: Apache-2.0
// Portable C++ on the compiler's vector extension (SSE2 on x86-64, NEON on aarch64).
#include "kernels_table.h"

namespace {

struct Baseline {
  using F = float __attribute__((vector_size(32)));
  using I = int32_t __attribute__((vector_size(32)));
  static constexpr int64_t kWidth = 8;
  static constexpr int kPanelRows = 2, kPanelParts = 3;  // a tile's rows; its columns are a part of a panel's

  static F Set(float value) { return F{value, value, value, value, value, value, value, value}; }
  static F Load(const float* p) {
    F value;
    std::memcpy(&value, p, sizeof(value));
    return value;
  }
  static void Store(float* p, F value) { std::memcpy(p, &value, sizeof(value)); }
  static F LoadWeight(const float* p) { return Load(p); }
  template <class W>
  static F LoadWeight(const W* p) {
    return F{ToFloat(p[0]), ToFloat(p[1]), ToFloat(p[2]), ToFloat(p[3]),
             ToFloat(p[4]), ToFloat(p[5]), ToFloat(p[6]), ToFloat(p[7])};
  }
  static float HalfToFloat(Half value) { return ToFloat(value); }
  static void LoadPairs(const float* p, F* even, F* odd) {
    *even = F{p[0], p[2], p[4], p[6], p[8], p[10], p[12], p[14]};
    *odd = F{p[1], p[3], p[5], p[7], p[9], p[11], p[13], p[15]};
  }
  static F Add(F a, F b) { return a + b; }
  static F Sub(F a, F b) { return a - b; }
  static F Mul(F a, F b) { return a * b; }
  static F Div(F a, F b) { return a / b; }
  static F Fma(F a, F b, F c) { return a * b + c; }
  static F Pick(I mask, F yes, F no) { return (F)((mask & (I)yes) | (~mask & (I)no)); }
  static F Min(F a, F b) { return Pick(a < b, a, b); }
  static F Max(F a, F b) { return Pick(a > b, a, b); }
  static F Relu(F value) { return Pick(value < Set(0.0f), Set(0.0f), value); }  // keeps NaN
  static I ToInt(F value) { return __builtin_convertvector(value, I); }
  static F ToVector(I value) { return __builtin_convertvector(value, F); }
  // Adding 1.5 * 2^23 rounds to an integer for every argument that Exp has.
  static F Round(F value) {
    F shifted = value + Set(12582912.0f);
    return shifted - Set(12582912.0f);
  }
  static F SelectLess(F a, F b, F yes, F no) { return Pick(a < b, yes, no); }
  static F PowerOfTwo(F n) { return (F)((ToInt(n) + 127) << 23); }
  static F SplitExponent(F value, F* exponent) {
    const I bits = (I)value;
    *exponent = ToVector((bits >> 23) - 126);
    return (F)((bits & 0x007fffff) | 0x3f000000);
  }
  static float Sum(F v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
  // columns[k] = number k of eight rows, `stride` apart.
  static void LoadColumns(const float* p, int64_t stride, F (&columns)[8]) {
    for (int k = 0; k < 8; ++k)
      for (int i = 0; i < 8; ++i) columns[k][i] = p[i * stride + k];
  }
  static F Levels(const uint8_t* q, int shift) {
    using Bytes = uint8_t __attribute__((vector_size(8)));
    Bytes bytes;
    std::memcpy(&bytes, q, sizeof(bytes));
    return __builtin_convertvector((bytes >> shift) & 15, F);
  }
  static F ShadowBlock(const uint8_t* q, const float* x) {
    const F low = Levels(q, 0) * Load(x) + Levels(q + 8, 0) * Load(x + 8);
    return low + (Levels(q, 4) * Load(x + 16) + Levels(q + 8, 4) * Load(x + 24));
  }
};

}  // namespace

const clada::Kernels clada::kBaselineKernels = MakeKernels<Baseline>("baseline");
