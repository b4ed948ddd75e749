// SPDX-License-Identifier: Apache-2.0
// The rules that need all scores of a row, and the hidden values of prompts. One block a row.
#include "arithmetic.h"
#include "block.h"
#include "kernels.h"

namespace clada::cuda {
namespace {

// Larger numbers for larger scores; NaN counts as infinite, and what is not eligible as -infinity.
__device__ __forceinline__ unsigned Rank(float score, bool eligible) {
  if (score != score) score = INFINITY;
  const unsigned bits = FloatToBits((eligible ? score : -INFINITY) + 0.0f);  // -0 becomes 0, which it equals
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// mask[e] = 1 for the k granules of the highest rank, ties to the lowest index: a radix selection, eight bits at a time.
__device__ void SelectTop(const Attributes& a, const RuleInput& rule, int64_t granules, int64_t k, const float* score,
                          uint8_t* mask) {
  __shared__ unsigned histogram[256];
  __shared__ unsigned digit_found;
  __shared__ int64_t wanted;
  static_assert(kThreads == 256, "a thread clears one bin");
  unsigned prefix = 0;
  if (threadIdx.x == 0) wanted = k;
  for (int shift = 24; shift >= 0; shift -= 8) {
    histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t e = threadIdx.x; e < granules; e += kThreads) {
      const unsigned rank = Rank(score[e], Eligible(a, rule, e));
      if (shift == 24 || rank >> (shift + 8) == prefix) CountInShared(&histogram[rank >> shift & 255u]);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t left = wanted;
      unsigned digit = 255;
      while (histogram[digit] < left) left -= histogram[digit--];
      digit_found = digit;
      wanted = left;  // how many of those that share the digits found so far
    }
    __syncthreads();
    prefix = prefix << 8 | digit_found;
    __syncthreads();
  }
  int64_t taken = 0;
  const int64_t among_equals = wanted;
  for (int64_t begin = 0; begin < granules; begin += kThreads) {
    const int64_t e = begin + threadIdx.x;
    const bool there = e < granules, eligible = there && Eligible(a, rule, e);
    const unsigned rank = there ? Rank(score[e], eligible) : 0u;
    int total = 0;
    const int before = BlockCountBefore(there && rank == prefix, &total);
    if (there) mask[e] = eligible && (rank > prefix || (rank == prefix && taken + before < among_equals));
    taken += total;
  }
}

// mask [E] of one row whose load is finite. The scores were written by this block.
__device__ void Select(const Problem& problem, const RuleInput& rule, float multiplier, const float* score, uint8_t* mask) {
  const Attributes& a = problem.attributes;
  const int64_t granules = problem.granules();
  if (a.rule == Rule::kTopk) {
    SelectTop(a, rule, granules, TopCount(rintf(rule.threshold[0] / multiplier), granules), score, mask);
    return;
  }
  float best = 1.0f;
  if (a.rule == Rule::kRelative) {
    float most = -INFINITY;
    for (int64_t e = threadIdx.x; e < granules; e += kThreads)
      if (Eligible(a, rule, e)) most = fmaxf(most, score[e]);  // fmaxf passes NaN over
    best = BlockMax(most);
    if (best == -INFINITY) best = 0.0f;
  }
  for (int64_t e = threadIdx.x; e < granules; e += kThreads)
    mask[e] = !(score[e] < Level(rule, e, multiplier) * best) && Eligible(a, rule, e);
}

// score [E] of one row: given, or the sums of what `neuron` says of each of a granule's neurons.
template <class Neuron>
__device__ __forceinline__ void ScoreGranules(const Problem& problem, int64_t row, float* score, const Neuron& neuron) {
  const Attributes& a = problem.attributes;
  for (int64_t e = threadIdx.x; e < problem.granules(); e += kThreads) {
    float sum = 0.0f;
    if (a.score == Score::kExternal)
      sum = External(problem, row, e);
    else
      for (int64_t j = e * a.granule; j < (e + 1) * a.granule; ++j) sum += neuron(j);
    score[e] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) SelectKernel(Problem problem, DecodePlan plan) {
  const Attributes& a = problem.attributes;
  const int64_t row = blockIdx.x, f = problem.intermediate_size, granules = problem.granules();
  const float load = problem.load[row];
  if (KindOf(load) != kSparseRow) return;
  float* score = plan.granule_score + row * granules;
  ScoreGranules(problem, row, score, [&](int64_t j) {
    return a.score == Score::kPrefix ? PrefixScore(problem, row, j) : plan.score[row * f + j];
  });
  __syncthreads();
  Select(problem, MakeRuleInput(problem, plan.prior, row), LoadMultiplier(a, load), score, plan.mask + row * granules);
}

// The score of neuron j of a prompt's row, from its products or the shadow's scores.
__device__ __forceinline__ float PromptScore(const Problem& problem, int64_t row, int64_t j, const float* product,
                                             const float* shadow) {
  switch (problem.attributes.score) {
    case Score::kGate: return fabsf(Gate(problem, j, product[0]));
    case Score::kExact: return fabsf(Hidden(problem, j, product)) * problem.neuron_scale[j];
    case Score::kShadow: return shadow[j];
    default: return PrefixScore(problem, row, j);
  }
}

template <class W>
__global__ void __launch_bounds__(kThreads) PromptHiddenKernel(Problem problem, PromptPlan plan, int64_t first) {
  const Attributes& a = problem.attributes;
  const int64_t i = blockIdx.x, row = first + i, f = problem.intermediate_size, n = problem.projections();
  const int64_t granules = problem.granules();
  const float load = problem.load[row];
  const int kind = KindOf(load);
  const float* pre = plan.pre + i * f * n;
  uint8_t* mask = plan.mask + i * granules;
  if (kind == kSparseRow) {
    float* score = plan.granule_score + i * granules;
    ScoreGranules(problem, row, score,
                  [&](int64_t j) { return PromptScore(problem, row, j, pre + j * n, plan.score + i * f); });
    __syncthreads();
    Select(problem, MakeRuleInput(problem, plan.prior, row), LoadMultiplier(a, load), score, mask);
    __syncthreads();
  }
  W* hidden = static_cast<W*>(plan.hidden) + i * f;
  float energy = 0.0f;
  int active = 0;
  for (int64_t j = threadIdx.x; j < f; j += kThreads) {
    const int64_t e = j / a.granule;
    if (kind == kPaddingRow || (kind == kSparseRow && !mask[e])) {
      hidden[j] = FromFloat<W>(0.0f);
      continue;
    }
    ++active;
    const float h = Hidden(problem, j, pre + j * n);
    energy += h * h;
    hidden[j] = FromFloat<W>(a.combine == Combine::kWeighted ? h * External(problem, row, e) : h);
  }
  if (a.emit_stat) {
    const float total = BlockSum(energy);
    // Is used for rows with load = +inf, where every neuron counts.
    if (threadIdx.x == 0) plan.energy[i] = a.stat_norm == StatNorm::kRow ? total : 1.0f;
  }
  if (problem.active) {
    const int total = BlockSum(active);
    if (threadIdx.x == 0) problem.active[row] = total;
  }
}

}  // namespace

cudaError_t LaunchSelect(const Problem& problem, const DecodePlan& plan, cudaStream_t stream) {
  return Launch(&SelectKernel, Blocks(problem.rows()), dim3(kThreads), stream, problem, plan);
}

cudaError_t LaunchPromptHidden(const Problem& problem, const PromptPlan& plan, int64_t first, int64_t rows, cudaStream_t stream) {
  return WithType(problem.weight_type, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    return Launch(&PromptHiddenKernel<W>, Blocks(rows), dim3(kThreads), stream, problem, plan, first);
  });
}

}  // namespace clada::cuda
