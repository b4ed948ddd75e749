// SPDX-License-Identifier: Apache-2.0
// The op's formulas for one number: activation, load, score, hidden value.
#ifndef CLADA_CUDA_ARITHMETIC_H_
#define CLADA_CUDA_ARITHMETIC_H_

#include "device.h"
#include "plan.h"

namespace clada::cuda {

enum RowKind : int { kSparseRow = 0, kDenseRow = 1, kPaddingRow = 2 };

__device__ __forceinline__ int KindOf(float load) {
  if (load == -INFINITY) return kPaddingRow;
  return load == INFINITY || load != load ? kDenseRow : kSparseRow;
}

__device__ __forceinline__ float Activate(Activation activation, float v) {
  switch (activation) {
    case Activation::kSilu: return v / (1.0f + expf(-v));
    case Activation::kGelu: return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    case Activation::kGeluTanh: return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case Activation::kRelu: return v != v || v > 0.0f ? v : 0.0f;
    case Activation::kRelu2: return v != v || v > 0.0f ? v * v : 0.0f;
    default: return v;
  }
}

// m(load), for finite loads.
__device__ __forceinline__ float LoadMultiplier(const Attributes& a, float load) {
  const float factor = a.load_slope != 0.0f ? expf(-a.load_slope * load) : 1.0f;
  return fminf(fmaxf(factor, a.load_min), a.load_max);
}

// What the rule needs besides scores.
struct RuleInput {
  const float* threshold;
  int64_t threshold_count;
  const float* ratio;   // [E] of the row's sequence, or null
  const float* factor;  // [E] of the row's sequence, or null
};

__device__ __forceinline__ RuleInput MakeRuleInput(const Problem& problem, const Prior& prior, int64_t row) {
  const int64_t sequence = row / problem.sequence * problem.granules();
  return {problem.threshold, problem.threshold_count, prior.ratio ? prior.ratio + sequence : nullptr,
          prior.factor ? prior.factor + sequence : nullptr};
}

__device__ __forceinline__ bool Eligible(const Attributes& a, const RuleInput& input, int64_t granule) {
  return input.ratio == nullptr || input.ratio[granule] >= a.backbone_min;
}

__device__ __forceinline__ float Level(const RuleInput& input, int64_t granule, float multiplier) {
  const float base = input.threshold[input.threshold_count == 1 ? 0 : granule] * multiplier;
  return input.factor ? base * input.factor[granule] : base;
}

// The hidden value of neuron j from its products with the row: (gate, up), or (up) alone.
__device__ __forceinline__ float Hidden(const Problem& problem, int64_t j, const float* product) {
  const Attributes& a = problem.attributes;
  const float first = product[0] + (a.has_bias ? (a.gated ? problem.gate_bias : problem.up_bias)[j] : 0.0f);
  if (!a.gated) return Activate(a.activation, first);
  const float second = product[1] + (a.has_bias ? problem.up_bias[j] : 0.0f);
  return Activate(a.activation, first) * second;
}

// The activated gate; of a plain FFN, the hidden value.
__device__ __forceinline__ float Gate(const Problem& problem, int64_t j, float product) {
  const Attributes& a = problem.attributes;
  return Activate(a.activation, product + (a.has_bias ? (a.gated ? problem.gate_bias : problem.up_bias)[j] : 0.0f));
}

// The given score of a granule, score `external`.
__device__ __forceinline__ float External(const Problem& problem, int64_t row, int64_t granule) {
  return problem.score[(problem.score_per_sequence ? row / problem.sequence : row) * problem.granules() + granule];
}

__device__ __forceinline__ float PrefixScore(const Problem& problem, int64_t row, int64_t j) {
  return sqrtf(problem.past_stat[row / problem.sequence * problem.intermediate_size + j]);
}

}  // namespace clada::cuda

#endif  // CLADA_CUDA_ARITHMETIC_H_
