// SPDX-License-Identifier: Apache-2.0
// The primitives of kernels.h, written once over a vector type V. Each instruction set includes this in a file of its own, with
// a V from its own anonymous namespace, so that no two of them share a function.
#ifndef CLADA_CPU_KERNELS_BODY_H_
#define CLADA_CPU_KERNELS_BODY_H_

#include <cstring>

#include "kernels.h"

namespace {

using clada::Activation;

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline float BitsToFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float ToFloat(float value) { return value; }
inline float ToFloat(BFloat value) { return BitsToFloat(static_cast<uint32_t>(value.bits) << 16); }
inline float ToFloat(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return BitsToFloat(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, NaN
  // Multiplying by 2^112 moves the exponent's bias and makes subnormals normal, exactly.
  const float magnitude = BitsToFloat(rest << 13) * 5.192296858534828e33f;
  uint32_t bits;
  std::memcpy(&bits, &magnitude, sizeof(bits));
  return BitsToFloat(sign | bits);
}

// A vector of `count` numbers, less than its width; the others are 0.
template <class V, class W>
inline typename V::F LoadPart(const W* p, int64_t count) {
  W part[V::kWidth] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return V::LoadWeight(part);
}

template <class V>
inline void StorePart(float* p, int64_t count, typename V::F value) {
  float part[V::kWidth];
  V::Store(part, value);
  for (int64_t i = 0; i < count; ++i) p[i] = part[i];
}

// Rows are walked in the order of memory, one stream at a time: two rows at once (gate and up, or several neurons) halve what a
// core reads a second, because they defeat the hardware's prefetching. A list's gaps defeat it too, so while one of its rows is
// used, the one that comes kAhead places later is fetched, into the second-level cache: the first level has too few slots for
// requests that take this long.
constexpr int64_t kAhead = 2;

template <class W>
inline void Fetch(const W* p) {
  __builtin_prefetch(p, 0, 2);
}

template <class W>
inline const W* Ahead(const W* w, int64_t stride, const int32_t* list, int64_t i, int64_t count) {
  const int64_t at = i + kAhead < count ? i + kAhead : count - 1;
  return w + (list ? list[at] : at) * stride;
}

template <class W>
inline void FetchFirst(const W* w, int64_t stride, const int32_t* list, int64_t count, int64_t length) {
  for (int64_t i = 0; i < kAhead && i < count; ++i)
    for (int64_t k = 0; k < length; k += 64 / static_cast<int64_t>(sizeof(W))) Fetch(w + (list ? list[i] : i) * stride + k);
}

// Two accumulators, whose sums are added at the end: vector i goes to accumulator i % 2. One would do for memory, but not for the
// caches; four bring nothing, and are more than the tiles of DotBlock have registers for.
template <class V, class W, bool kFetch>
inline float DotRow(const float* x, const W* w, const W* ahead, int64_t d) {
  using F = typename V::F;
  constexpr int64_t kWidth = V::kWidth, kLine = 64 / static_cast<int64_t>(sizeof(W));
  F a = V::Set(0.0f), b = a;
  int64_t i = 0;
  for (; i + 4 * kWidth <= d; i += 4 * kWidth) {
    if constexpr (kFetch)
      for (int64_t k = 0; k < 4 * kWidth; k += kLine) Fetch(ahead + i + k);
    a = V::Fma(V::LoadWeight(w + i), V::Load(x + i), a);
    b = V::Fma(V::LoadWeight(w + i + kWidth), V::Load(x + i + kWidth), b);
    a = V::Fma(V::LoadWeight(w + i + 2 * kWidth), V::Load(x + i + 2 * kWidth), a);
    b = V::Fma(V::LoadWeight(w + i + 3 * kWidth), V::Load(x + i + 3 * kWidth), b);
  }
  for (; i < d; i += kWidth) {
    const int64_t left = d - i;
    F& sum = i / kWidth % 2 ? b : a;
    sum = left < kWidth ? V::Fma(LoadPart<V>(w + i, left), LoadPart<V>(x + i, left), sum)
                        : V::Fma(V::LoadWeight(w + i), V::Load(x + i), sum);
  }
  return V::Sum(V::Add(a, b));
}

template <class V, class W>
void Dot(const float* x, const void* weights, int64_t d, int64_t stride, int subrows, const int32_t* list, int64_t count,
         float* out) {
  const W* w = static_cast<const W*>(weights);
  if (list == nullptr && stride == subrows * d) {
    for (int64_t i = 0; i < count; ++i)
      for (int s = 0; s < subrows; ++s) *out++ = DotRow<V, W, false>(x, w + i * stride + s * d, nullptr, d);
    return;
  }
  FetchFirst(w, stride, list, count, subrows * d);
  for (int64_t i = 0; i < count; ++i) {
    const W* ahead = Ahead(w, stride, list, i, count);
    const W* neuron = w + (list ? list[i] : i) * stride;
    for (int s = 0; s < subrows; ++s) *out++ = DotRow<V, W, true>(x, neuron + s * d, ahead + s * d, d);
  }
}

template <class V, class W, bool kFetch>
inline void AxpyRow(float coefficient, const W* row, const W* ahead, int64_t d, float* y) {
  constexpr int64_t kWidth = V::kWidth, kLine = 64 / static_cast<int64_t>(sizeof(W));
  const typename V::F c = V::Set(coefficient);
  int64_t i = 0;
  for (; i + 2 * kWidth <= d; i += 2 * kWidth) {
    if constexpr (kFetch)
      for (int64_t k = 0; k < 2 * kWidth; k += kLine) Fetch(ahead + i + k);
    V::Store(y + i, V::Fma(c, V::LoadWeight(row + i), V::Load(y + i)));
    V::Store(y + i + kWidth, V::Fma(c, V::LoadWeight(row + i + kWidth), V::Load(y + i + kWidth)));
  }
  for (; i + kWidth <= d; i += kWidth) V::Store(y + i, V::Fma(c, V::LoadWeight(row + i), V::Load(y + i)));
  if (i < d) StorePart<V>(y + i, d - i, V::Fma(c, LoadPart<V>(row + i, d - i), LoadPart<V>(y + i, d - i)));
}

template <class V, class W>
void Axpy(const float* coefficient, const void* weights, int64_t d, const int32_t* list, int64_t count, float* y) {
  const W* w = static_cast<const W*>(weights);
  if (list == nullptr) {
    for (int64_t i = 0; i < count; ++i) AxpyRow<V, W, false>(coefficient[i], w + i * d, nullptr, d, y);
    return;
  }
  FetchFirst(w, d, list, count, d);
  for (int64_t i = 0; i < count; ++i) AxpyRow<V, W, true>(coefficient[i], w + list[i] * d, Ahead(w, d, list, i, count), d, y);
}

template <class V, class W>
void Convert(const void* weights, int64_t count, float* out) {
  const W* w = static_cast<const W*>(weights);
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) V::Store(out + i, V::LoadWeight(w + i));
  for (; i < count; ++i) out[i] = ToFloat(w[i]);
}

template <class V>
void Fold(const float* x, int64_t d, float* folded) {
  for (int64_t block = 0; block < d / clada::kShadowBlock; ++block) {
    typename V::F sum = V::Set(0.0f);
    for (int i = 0; i < clada::kShadowBlock; i += V::kWidth) sum = V::Add(sum, V::Load(x + block * clada::kShadowBlock + i));
    folded[2 * block] = 0.0f;
    folded[2 * block + 1] = V::Sum(sum);
  }
}

constexpr int64_t kScaleBlocks = 128;  // blocks whose scales are converted at a time: 1 KiB on the stack

template <class V>
void Shadow(const float* x, const float* folded, const uint8_t* q, const uint16_t* scale, int64_t d, int64_t count,
            float* out) {
  const int64_t blocks = d / clada::kShadowBlock;
  float pairs[2 * kScaleBlocks];
  for (int64_t row = 0; row < count; ++row) {
    typename V::F even = V::Set(0.0f), odd = V::Set(0.0f), offsets = V::Set(0.0f);
    float rest = 0.0f;
    for (int64_t first = 0; first < blocks; first += kScaleBlocks) {
      const int64_t part = blocks - first < kScaleBlocks ? blocks - first : kScaleBlocks;
      const float* sums = folded + 2 * first;
      const Half* halves = reinterpret_cast<const Half*>(scale + 2 * (row * blocks + first));
      int64_t i = 0;
      for (; i + V::kWidth <= 2 * part; i += V::kWidth) {
        const typename V::F pair = V::LoadWeight(halves + i);
        V::Store(pairs + i, pair);
        offsets = V::Fma(pair, V::Load(sums + i), offsets);
      }
      for (; i < 2 * part; ++i) {
        pairs[i] = V::HalfToFloat(halves[i]);
        rest += pairs[i] * sums[i];
      }
      const uint8_t* packed = q + (row * blocks + first) * (clada::kShadowBlock / 2);
      const float* values = x + first * clada::kShadowBlock;
      int64_t block = 0;
      for (; block + 2 <= part; block += 2) {
        __builtin_prefetch(packed + block * 16 + 1024);
        even = V::Fma(V::ShadowBlock(packed + block * 16, values + block * 32), V::Set(pairs[2 * block]), even);
        odd = V::Fma(V::ShadowBlock(packed + block * 16 + 16, values + block * 32 + 32), V::Set(pairs[2 * block + 2]), odd);
      }
      if (block < part)
        even = V::Fma(V::ShadowBlock(packed + block * 16, values + block * 32), V::Set(pairs[2 * block]), even);
    }
    out[row] = V::Sum(V::Add(V::Add(even, odd), offsets)) + rest;
  }
}

// c[0] x^(N-1) + ... + c[N-1]
template <class V, int N>
inline typename V::F Polynomial(typename V::F x, const float (&c)[N]) {
  typename V::F p = V::Set(c[0]);
  for (int i = 1; i < N; ++i) p = V::Fma(p, x, V::Set(c[i]));
  return p;
}

// Cephes' expf: relative error about 1e-7 from -87 to 88.3; below, e^-87, and above, infinite (where float32 ends at 88.7), so that
// the sigmoid of a large negative number is 0.
template <class V>
inline typename V::F Exp(typename V::F value) {
  using F = typename V::F;
  const F x = V::Max(V::Min(value, V::Set(89.0f)), V::Set(-87.0f));
  const F n = V::Round(V::Mul(x, V::Set(1.44269504088896341f)));
  F r = V::Fma(n, V::Set(-0.693359375f), x);
  r = V::Fma(n, V::Set(2.12194440e-4f), r);
  constexpr float kC[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                          4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  F p = Polynomial<V>(r, kC);
  p = V::Fma(V::Mul(p, r), r, V::Add(r, V::Set(1.0f)));
  return V::Mul(p, V::PowerOfTwo(n));
}

// Cephes' logf for positive, normal numbers.
template <class V>
inline typename V::F Log(typename V::F value) {
  using F = typename V::F;
  F exponent;
  F m = V::SplitExponent(value, &exponent);  // m in [0.5, 1)
  const F small = V::Set(0.707106781186547524f);
  exponent = V::SelectLess(m, small, V::Sub(exponent, V::Set(1.0f)), exponent);
  m = V::Sub(V::SelectLess(m, small, V::Add(m, m), m), V::Set(1.0f));
  const F square = V::Mul(m, m);
  constexpr float kC[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                          -1.6668057665e-1f, 2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  F p = Polynomial<V>(m, kC);
  p = V::Mul(V::Mul(p, m), square);
  p = V::Fma(exponent, V::Set(-2.12194440e-4f), p);
  p = V::Fma(square, V::Set(-0.5f), p);
  return V::Fma(exponent, V::Set(0.693359375f), V::Add(m, p));
}

// A rational minimax of erf on [-4, 4], where it rounds to +-1 (the one that Eigen uses): absolute error below 3e-7.
template <class V>
inline typename V::F Erf(typename V::F value) {
  using F = typename V::F;
  const F x = V::Max(V::Min(value, V::Set(4.0f)), V::Set(-4.0f));
  const F square = V::Mul(x, x);
  constexpr float kP[] = {-2.72614225801306e-10f, 2.77068142495902e-08f,  -2.10102402082508e-06f, -5.69250639462346e-05f,
                          -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f};
  constexpr float kQ[] = {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f,
                          -1.42647390514189e-02f};
  return V::Div(V::Mul(x, Polynomial<V>(square, kP)), Polynomial<V>(square, kQ));
}

template <class V>
inline typename V::F Sigmoid(typename V::F value) {
  return V::Div(V::Set(1.0f), V::Add(V::Set(1.0f), Exp<V>(V::Sub(V::Set(0.0f), value))));
}

template <class V, Activation A>
inline typename V::F Act(typename V::F value) {
  using F = typename V::F;
  switch (A) {
    case Activation::kSilu: return V::Mul(value, Sigmoid<V>(value));
    case Activation::kGelu: {
      const F half = V::Mul(value, V::Set(0.5f));
      return V::Fma(half, Erf<V>(V::Mul(value, V::Set(0.70710678118654752f))), half);
    }
    case Activation::kGeluTanh: {
      // (1 + tanh u) / 2 is the sigmoid of 2 u.
      const F cube = V::Mul(V::Mul(value, value), value);
      return V::Mul(value, Sigmoid<V>(V::Mul(V::Set(1.59576912160573071f), V::Fma(cube, V::Set(0.044715f), value))));
    }
    case Activation::kRelu: return V::Relu(value);
    case Activation::kRelu2: {
      const F positive = V::Relu(value);
      return V::Mul(positive, positive);
    }
    default: return value;
  }
}

template <class V, Activation A, bool kGated>
void ActivateAll(const float* pre, int64_t count, float* hidden) {
  using F = typename V::F;
  constexpr int64_t kStep = kGated ? 2 : 1;
  int64_t i = 0;
  // The rest goes through a full vector too, so that a neuron's bits do not depend on its place.
  for (; i < count; i += V::kWidth) {
    float in[2 * V::kWidth], out[V::kWidth];
    const float* source = pre + kStep * i;
    const bool part = count - i < V::kWidth;
    if (part) {
      for (int64_t k = 0; k < kStep * V::kWidth; ++k) in[k] = k < kStep * (count - i) ? source[k] : 0.0f;
      source = in;
    }
    F result;
    if constexpr (kGated) {
      F gate, up;
      V::LoadPairs(source, &gate, &up);
      result = V::Mul(Act<V, A>(gate), up);
    } else {
      result = Act<V, A>(V::Load(source));
    }
    if (part) {
      V::Store(out, result);
      for (int64_t k = 0; k < count - i; ++k) hidden[i + k] = out[k];
    } else {
      V::Store(hidden + i, result);
    }
  }
}

template <class V, bool kGated>
inline void ActivateOne(Activation activation, const float* pre, int64_t count, float* hidden) {
  switch (activation) {
    case Activation::kSilu: return ActivateAll<V, Activation::kSilu, kGated>(pre, count, hidden);
    case Activation::kGelu: return ActivateAll<V, Activation::kGelu, kGated>(pre, count, hidden);
    case Activation::kGeluTanh: return ActivateAll<V, Activation::kGeluTanh, kGated>(pre, count, hidden);
    case Activation::kRelu: return ActivateAll<V, Activation::kRelu, kGated>(pre, count, hidden);
    case Activation::kRelu2: return ActivateAll<V, Activation::kRelu2, kGated>(pre, count, hidden);
    case Activation::kIdentity: return ActivateAll<V, Activation::kIdentity, kGated>(pre, count, hidden);
  }
}

template <class V>
void Activate(Activation activation, bool gated, const float* pre, int64_t count, float* hidden) {
  gated ? ActivateOne<V, true>(activation, pre, count, hidden) : ActivateOne<V, false>(activation, pre, count, hidden);
}

template <class V>
void Add(const float* a, int64_t count, float* y) {
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) V::Store(y + i, V::Add(V::Load(y + i), V::Load(a + i)));
  for (; i < count; ++i) y[i] += a[i];
}

template <class V>
void InversePower(const float* r, int64_t count, float gamma, float* out) {
  using F = typename V::F;
  constexpr float kSmallest = 1.17549435e-38f, kTwo64 = 18446744073709551616.0f, kLog64 = 44.3614195558364998f;
  for (int64_t i = 0; i < count; i += V::kWidth) {
    float in[V::kWidth], result[V::kWidth];
    const int64_t part = count - i < V::kWidth ? count - i : V::kWidth;
    for (int64_t k = 0; k < V::kWidth; ++k) in[k] = k < part ? r[i + k] : 1.0f;
    const F value = V::Load(in), smallest = V::Set(kSmallest);
    // Subnormal numbers are made normal for the logarithm.
    F log = Log<V>(V::SelectLess(value, smallest, V::Mul(value, V::Set(kTwo64)), value));
    log = V::SelectLess(value, smallest, V::Sub(log, V::Set(kLog64)), log);
    // The square of the root goes down to 0 and up to infinity as the power does; Exp stops before.
    const F root = Exp<V>(V::Mul(V::Set(-0.5f * gamma), log));
    V::Store(result, V::SelectLess(V::Set(0.0f), value, V::Mul(root, root), V::Set(__builtin_inff())));
    for (int64_t k = 0; k < part; ++k) out[i + k] = result[k];
  }
}

}  // namespace

#endif  // CLADA_CPU_KERNELS_BODY_H_
