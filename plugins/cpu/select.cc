// SPDX-License-Identifier: Apache-2.0
// The rules: which granules run.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "plan.h"

namespace clada {

float LoadMultiplier(const Attributes& a, float load) {
  // 0 * inf is NaN: a slope of zero means no response whatever the load is.
  const float factor = a.load_slope != 0.0f ? std::exp(-a.load_slope * load) : 1.0f;
  return std::min(std::max(factor, a.load_min), a.load_max);
}

namespace {

// Larger for what ranks higher: by the score's bits, turned so that they order as integers; equal scores by the index. NaN counts
// as infinite. Scores are read once, so that the order holds whatever happens to their memory.
uint64_t Key(float score, int64_t index) {
  if (std::isnan(score)) score = HUGE_VALF;
  score += 0.0f;  // -0 equals 0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (UINT32_MAX - static_cast<uint32_t>(index));
}

int64_t Granule(uint64_t key) { return UINT32_MAX - static_cast<uint32_t>(key); }

}  // namespace

void Decide(const Problem& problem, int64_t first, int64_t count, const float* score, float multiplier, const float* prior,
            const float* prior_factor, uint8_t* mask, uint64_t* rank) {
  const Attributes& a = problem.attributes;
  const auto eligible = [&](int64_t i) { return prior == nullptr || prior[first + i] >= a.backbone_min; };
  const auto level = [&](int64_t i) {
    const float base = problem.threshold[problem.threshold_count == 1 ? 0 : first + i] * multiplier;
    return prior_factor ? base * prior_factor[first + i] : base;
  };
  // The negated comparisons keep NaN scores.
  switch (a.rule) {
    case Rule::kThreshold:
      for (int64_t i = 0; i < count; ++i) mask[i] = !(score[i] < level(i)) && eligible(i);
      return;
    case Rule::kRelative: {
      float best = -std::numeric_limits<float>::infinity();
      for (int64_t i = 0; i < count; ++i)
        if (score[i] > best && eligible(i)) best = score[i];
      if (std::isinf(best) && best < 0) best = 0.0f;
      for (int64_t i = 0; i < count; ++i) mask[i] = !(score[i] < level(i) * best) && eligible(i);
      return;
    }
    case Rule::kTopk: {
      const int64_t k = TopCount(std::nearbyint(problem.threshold[0] / multiplier), count);
      for (int64_t i = 0; i < count; ++i) rank[i] = Key(eligible(i) ? score[i] : -HUGE_VALF, i), mask[i] = 0;
      if (k < count) std::nth_element(rank, rank + (k - 1), rank + count, std::greater<uint64_t>());
      for (int64_t i = 0; i < k; ++i) {
        const int64_t e = Granule(rank[i]);
        mask[e] = eligible(e);
      }
      return;
    }
  }
}

}  // namespace clada
