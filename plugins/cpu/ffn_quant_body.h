// SPDX-License-Identifier: Apache-2.0
// The kernels of ffn_quant_kernels.h, written once over a vector type V, which is one of quant_body.h with more:
//
//   V::Quad<width>(p, at, out)  bytes of four neurons beside each other: 32-bit lane 4 L + i of out[t] is byte
//                               at + 4 (width L + t) + i of p[0], p[1], p[2] and p[3]. Reads width * kLanes bytes of each.
//   V::Dot(sum, codes, x)       adds to each lane the products of its four bytes with those of x; codes below 2^7, or any if
//                               kWideDot
//   V::AddInt, StoreInts, and LoadFloats, StoreFloats, LoadHalves for the first `count` lanes, a multiple of four
//
// A lane is a column of w_out and holds four neurons: no sum over neurons runs across lanes, and a vector's scales are one load.
#ifndef CLADA_CPU_FFN_QUANT_BODY_H_
#define CLADA_CPU_FFN_QUANT_BODY_H_

#include "ffn_quant_kernels.h"
#include "quant_body.h"

namespace {

using clada::quant::DownCall;
using clada::quant::GroupBytes;
using clada::quant::kChunkColumns;
using clada::quant::kUnitColumns;
using clada::quant::NeuronBytes;

constexpr int kSums = 8;         // vectors of columns that come out of the bytes of one load
constexpr int64_t kQuad = 4;     // neurons that are multiplied together

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// body(Constant<0>()) .. body(Constant<kCount - 1>()).
template <int kCount, int kFirst = 0, class Body>
inline __attribute__((always_inline)) void Each(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(Constant<kFirst>());
    Each<kCount, kFirst + 1>(body);
  }
}

// The values of sum `kSum` in a plane of `kWidth` bits, `kTo` bits to the left.
template <class V, int kWidth, int kSum, int kTo>
inline typename V::I PlaneValues(const typename V::I (&loaded)[kWidth]) {
  constexpr int kPer = 8 / kWidth;
  return V::And(V::template Shift<kTo - kWidth * (kSum % kPer)>(loaded[kSum / kPer]), V::SetByte(((1 << kWidth) - 1) << kTo));
}

// The codes of four neurons: those of sum `kSum` have a column in each lane.
template <class V, int kBits>
struct Quads {
  static constexpr int kLow = kBits - kHighBits, kLowLoads = kLow > 0 ? kLow : 1;
  typename V::I high[kHighBits], low[kLowLoads];

  inline __attribute__((always_inline)) void Load(const uint8_t* const* p, int64_t high_at, int64_t low_at) {
    V::template Quad<kHighBits>(p, high_at, high);
    if constexpr (kLow > 0) V::template Quad<kLow>(p, low_at, low);
  }
  template <int kSum>
  inline __attribute__((always_inline)) typename V::I High() const {
    return PlaneValues<V, kHighBits, kSum, 0>(high);
  }
  template <int kSum>
  inline __attribute__((always_inline)) typename V::I Low() const {
    return PlaneValues<V, kLowLoads, kSum, 0>(low);
  }
  template <int kSum>
  inline __attribute__((always_inline)) typename V::I Code() const {
    if constexpr (kLow == 0) return High<kSum>();
    else return V::Or(PlaneValues<V, kHighBits, kSum, kLow>(high), Low<kSum>());
  }
};

// What is read of a group.
struct Active {
  int64_t group;  // DownCall::groups: none
  int64_t quads;
  const uint8_t* at;
  const uint8_t* list;

  // The neurons of a quad.
  template <int kBits>
  inline void Neurons(int64_t quad, int64_t columns, const uint8_t* (&p)[kQuad]) const {
    for (int64_t i = 0; i < kQuad; ++i) p[i] = at + list[quad * kQuad + i] * NeuronBytes(columns, kBits);
  }
};

// The first group from `from` on that adds anything. One whose scale is NaN does, without a neuron.
template <int kBits>
inline Active NextActive(const DownCall& call, int64_t from) {
  while (from < call.groups && call.scale[from] == 0.0f) ++from;
  const int64_t quads = from < call.groups ? call.quads[from] : 0;
  return {from, quads, call.w_out + from * GroupBytes(call.columns, kBits), call.list + from * kBlock};
}

constexpr int64_t kNearBytes = 10 << 10;  // of a group that are fetched into the first cache; more go into the second: measured

// Fetches what will be read of a group, line after line as they lie in memory; in the order in which chunks read them, a line here
// and a line there, small layers took a fifth longer.
template <int kBits>
class Fetcher {
 public:
  Fetcher(const DownCall& call, const Active& of) : of_(of), neurons_(of.quads * kQuad) {
    constexpr int kLow = kBits - kHighBits;
    stride_ = NeuronBytes(call.columns, kBits);
    from_[0] = call.first * kHighBits / 8, end_[0] = call.end * kHighBits / 8;
    from_[1] = (call.columns * kHighBits + call.first * kLow) / 8, end_[1] = (call.columns * kHighBits + call.end * kLow) / 8;
    // What is whole is one piece.
    if (end_[0] == from_[1]) end_[0] = end_[1], planes_ = 1;
    if constexpr (kLow == 0) planes_ = 1;
    far_ = kBlock * (end_[0] - from_[0]) > kNearBytes;
    if (neurons_ > 0) Begin();
  }

  // How many lines a step has to fetch, of so many steps.
  int64_t Rate(int64_t steps) const {
    int64_t lines = (end_[0] - from_[0] + kLine - 1) / kLine + 1;
    if (planes_ == 2) lines += (end_[1] - from_[1] + kLine - 1) / kLine + 1;
    return steps > 0 ? (lines * neurons_ + steps - 1) / steps : 0;
  }

  inline __attribute__((always_inline)) void Fetch(int64_t lines) {
    for (; lines > 0 && neurons_ > 0; --lines) {
      far_ ? __builtin_prefetch(at_, 0, 2) : __builtin_prefetch(at_, 0, 3);
      if ((at_ += kLine) >= stop_) Advance();
    }
  }

 private:
  void Begin() {
    const uint8_t* neuron = of_.at + of_.list[place_] * stride_;
    at_ = neuron + from_[plane_], stop_ = neuron + end_[plane_];
    at_ -= reinterpret_cast<uintptr_t>(at_) % kLine;
  }
  void Advance() {
    if (++plane_ >= planes_) plane_ = 0, ++place_, --neurons_;
    if (neurons_ > 0) Begin();
  }

  const Active& of_;
  int64_t neurons_, place_ = 0, stride_;
  int plane_ = 0, planes_ = 2;
  bool far_ = false;
  int64_t from_[2], end_[2];
  const uint8_t *at_ = nullptr, *stop_ = nullptr;
};

// A group's share of the chunk at `column`, of kUnits units.
template <class V, int kBits, int kUnits>
inline void DownChunk(const DownCall& call, const Active& active, int64_t column, Fetcher<kBits>* fetcher, int64_t rate) {
  constexpr int kLow = kBits - kHighBits, kLanes = V::kLanes, kWidth = kChunkColumns / kUnitColumns * kUnits;
  constexpr bool kApart = kBits == 8 && !V::kWideDot;
  const int64_t low_plane = call.columns * kHighBits / 8;
  const uint8_t* scales = active.at + kBlock * NeuronBytes(call.columns, kBits) + 2 * column;
  float* y = call.y + column;
  const int32_t start = ZeroShare<kBits>(call.sum[active.group]);
  const typename V::F scale = V::Set(call.scale[active.group]);
  const int8_t* q = call.q + active.group * kBlock;
  for (int at = 0; at < kWidth; at += kLanes) {
    const int64_t high_at = column * kHighBits / 8 + at * kHighBits, low_at = low_plane + column * kLow / 8 + at * kLow;
    typename V::I sum[kSums], apart[kApart ? kSums : 1];
    for (int s = 0; s < kSums; ++s) sum[s] = V::SetInt(kApart ? 0 : start);
    if constexpr (kApart)
      for (int s = 0; s < kSums; ++s) apart[s] = V::SetInt(start);
    for (int64_t i = 0; i < active.quads; ++i) {
      if (at == 0) fetcher->Fetch(rate);
      const uint8_t* p[kQuad];
      active.Neurons<kBits>(i, call.columns, p);
      Quads<V, kBits> quads;
      quads.Load(p, high_at, low_at);
      const int32_t x = StepOf(q, static_cast<int>(i));
      Each<kSums>([&](auto s) __attribute__((always_inline)) {
        constexpr int kSum = decltype(s)::value;
        if constexpr (kApart) {
          sum[kSum] = V::Dot(sum[kSum], quads.template High<kSum>(), x);
          apart[kSum] = V::Dot(apart[kSum], quads.template Low<kSum>(), x);
        } else {
          sum[kSum] = V::Dot(sum[kSum], quads.template Code<kSum>(), x);
        }
      });
    }
    const int count = kWidth - at < kLanes ? kWidth - at : kLanes;
    for (int s = 0; s < kSums; ++s) {
      if constexpr (kApart) sum[s] = V::AddInt(apart[s], V::template Shift<kHighBits>(sum[s]));
      const int lane = kWidth * s + at;
      const typename V::F by = V::Mul(scale, V::LoadHalves(scales + 2 * lane, count));
      V::StoreFloats(y + lane, V::Fma(V::ToFloat(sum[s]), by, V::LoadFloats(y + lane, count)), count);
    }
  }
}

template <class V, int kBits>
void Down(const DownCall& call) {
  for (int64_t c = call.first; c < call.end; ++c) call.y[c] = 0.0f;
  Active active = NextActive<kBits>(call, 0);
  while (active.group < call.groups) {
    const Active next = NextActive<kBits>(call, active.group + 1);
    Fetcher<kBits> fetcher(call, next);
    const int64_t rate = fetcher.Rate(active.quads * ((call.end - call.first + kChunkColumns - 1) / kChunkColumns));
    if (next.quads > 0)
      for (int64_t at = 2 * call.first; at < 2 * call.end; at += kLine)
        __builtin_prefetch(next.at + kBlock * NeuronBytes(call.columns, kBits) + at, 0, 3);
    int64_t column = call.first;
    for (; column + kChunkColumns <= call.end; column += kChunkColumns)
      DownChunk<V, kBits, 4>(call, active, column, &fetcher, rate);
    switch ((call.end - column) / kUnitColumns) {
      case 3: DownChunk<V, kBits, 3>(call, active, column, &fetcher, rate); break;
      case 2: DownChunk<V, kBits, 2>(call, active, column, &fetcher, rate); break;
      case 1: DownChunk<V, kBits, 1>(call, active, column, &fetcher, rate); break;
      default: break;
    }
    active = next;
  }
}

// Four neurons are a step of a record, and 32 columns its rows; the bytes of a plane lie in both at the same bits.
template <class V, int kBits, int kUnits>
inline void ChunkToRecords(const uint8_t* group, int64_t columns, int64_t column, uint8_t* records, int64_t stride) {
  constexpr int kLow = kBits - kHighBits, kLanes = V::kLanes, kWidth = kChunkColumns / kUnitColumns * kUnits;
  const int64_t low_plane = columns * kHighBits / 8, bytes = NeuronBytes(columns, kBits);
  for (int at = 0; at < kWidth; at += kLanes) {
    const int count = kWidth - at < kLanes ? kWidth - at : kLanes;
    // Puts a plane's values of step `step` where they belong.
    const auto put = [&](int step, int width, int64_t plane, int lane, typename V::I values) __attribute__((always_inline)) {
      const int per = 8 / width, bit = width * (step % per);
      alignas(64) int32_t lanes[kLanes];
      V::StoreInts(lanes, values);
      for (int i = 0; i < count; ++i) {
        uint8_t* to = records + (lane + i) / kTileRows * stride + plane + step / per * kRun + (lane + i) % kTileRows * kStep;
        int32_t word = 0;
        if (bit > 0) __builtin_memcpy(&word, to, sizeof(word));
        // Values are below 2^width, so bits do not leave their byte.
        word |= static_cast<int32_t>(static_cast<uint32_t>(lanes[i]) << bit);
        __builtin_memcpy(to, &word, sizeof(word));
      }
    };
    for (int step = 0; step < kSteps; ++step) {
      const uint8_t* p[kQuad];
      for (int64_t i = 0; i < kQuad; ++i) p[i] = group + (step * kQuad + i) * bytes;
      Quads<V, kBits> quads;
      quads.Load(p, column * kHighBits / 8 + at * kHighBits, low_plane + column * kLow / 8 + at * kLow);
      Each<kSums>([&](auto s) __attribute__((always_inline)) {
        constexpr int kSum = decltype(s)::value;
        put(step, kHighBits, 0, kWidth * kSum + at, quads.template High<kSum>());
        if constexpr (kLow > 0) put(step, kLow, kHighBytes, kWidth * kSum + at, quads.template Low<kSum>());
      });
    }
  }
  const uint8_t* scales = group + kBlock * bytes + 2 * column;
  for (int t = 0; t < kUnits; ++t)
    __builtin_memcpy(records + t * stride + kHighBytes + LowBytes(kBits), scales + t * 2 * kTileRows, 2 * kTileRows);
}

template <class V, int kBits>
void ToRecords(const uint8_t* group, int64_t columns, int64_t column, uint8_t* records, int64_t stride) {
  const int64_t units = (columns - column) / kUnitColumns;
  switch (units < 4 ? units : 4) {
    case 4: return ChunkToRecords<V, kBits, 4>(group, columns, column, records, stride);
    case 3: return ChunkToRecords<V, kBits, 3>(group, columns, column, records, stride);
    case 2: return ChunkToRecords<V, kBits, 2>(group, columns, column, records, stride);
    case 1: return ChunkToRecords<V, kBits, 1>(group, columns, column, records, stride);
    default: return;
  }
}

template <class V>
constexpr clada::quant::FfnKernels MakeFfnKernels() {
  using clada::quant::kFormatBits;
  static_assert(clada::quant::kFormats == 4, "one of each");
  return {{Down<V, kFormatBits[0]>, Down<V, kFormatBits[1]>, Down<V, kFormatBits[2]>, Down<V, kFormatBits[3]>},
          {ToRecords<V, kFormatBits[0]>, ToRecords<V, kFormatBits[1]>, ToRecords<V, kFormatBits[2]>, ToRecords<V, kFormatBits[3]>}};
}

}  // namespace

#endif  // CLADA_CPU_FFN_QUANT_BODY_H_
