// SPDX-License-Identifier: Apache-2.0
// The rules: which granules run.
#include <algorithm>
#include <cmath>
#include <limits>

#include "plan.h"

namespace clada {

float LoadMultiplier(const Attributes& a, float load) {
  // 0 * inf is NaN: a slope of zero means no response whatever the load is.
  const float factor = a.load_slope != 0.0f ? std::exp(-a.load_slope * load) : 1.0f;
  return std::min(std::max(factor, a.load_min), a.load_max);
}

void Decide(const Problem& problem, int64_t first, int64_t count, const float* score, float multiplier, const float* prior,
            const float* prior_factor, uint8_t* mask, int32_t* rank) {
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
      const float wanted = std::nearbyint(problem.threshold[0] / multiplier);
      const int64_t k = static_cast<int64_t>(std::min(std::max(wanted, 1.0f), static_cast<float>(count)));
      const auto key = [&](int32_t i) {
        if (!eligible(i)) return -std::numeric_limits<float>::infinity();
        return std::isnan(score[i]) ? std::numeric_limits<float>::infinity() : score[i];
      };
      for (int64_t i = 0; i < count; ++i) rank[i] = static_cast<int32_t>(i), mask[i] = 0;
      std::nth_element(rank, rank + (k - 1), rank + count, [&](int32_t i, int32_t j) {
        const float left = key(i), right = key(j);
        return left > right || (left == right && i < j);
      });
      for (int64_t i = 0; i < k; ++i) mask[rank[i]] = eligible(rank[i]);
      return;
    }
  }
}

}  // namespace clada
