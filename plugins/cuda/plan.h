// SPDX-License-Identifier: Apache-2.0
// How one call is cut up, and where its scratch memory lies. Nothing here depends on the device or on data.
#ifndef CLADA_CUDA_PLAN_H_
#define CLADA_CUDA_PLAN_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "clada/sparse_ffn_cuda.h"

namespace clada::cuda {

constexpr int kThreads = 256;             // of nearly every block
constexpr int kWarps = kThreads / 32;
constexpr int kReduceWarps = 32;          // of a block that adds up parts: many loads in flight, for there is little else to do
constexpr int kMaxRange = 32;             // neurons of one block: one bit of a warp's ballot each
constexpr int kLaneWeights = 8;           // weights that a lane multiplies at a time
constexpr int kWarpWeights = 32 * kLaneWeights;
constexpr int kShadowWeights = 32 * kShadowBlock;  // 4-bit weights that a warp multiplies at a time
constexpr int kColumns = 8;               // of w_out that a lane adds up at a time
constexpr int kMaxParts = 64;             // of the sum over neurons
constexpr int64_t kPanelBytes = 96 << 20;  // scratch of a prompt's panel of rows, about
constexpr int64_t kPanelRows = 128;        // the fewest rows of a panel
constexpr int64_t kMostPanelRows = 32768;  // a launch has at most 65535 blocks along an axis

CLADA_ANYWHERE constexpr int64_t CeilDiv(int64_t value, int64_t step) { return (value + step - 1) / step; }
CLADA_ANYWHERE constexpr int64_t RoundUp(int64_t value, int64_t step) { return CeilDiv(value, step) * step; }

// Rows are computed in groups of 1, 4 or 16: the kernels are compiled for these.
constexpr int64_t RowGroup(int64_t rows) { return rows <= 1 ? 1 : rows <= 4 ? 4 : kDecodeRows; }

// Can a block decide for its own neurons? Not if the rule compares all scores, or a granule is wider than a block's range.
CLADA_ANYWHERE inline bool IsLocal(const Attributes& a) { return a.rule == Rule::kThreshold && a.granule <= kMaxRange; }

// Neurons of one block: narrow layers get narrow ranges, so that there are blocks for every multiprocessor. It depends on sizes
// alone, which keeps the order of the sums, and so the bits, the same on every device and for every number of rows.
inline int64_t Range(const Problem& problem) {
  const int64_t f = problem.intermediate_size, granule = IsLocal(problem.attributes) ? problem.attributes.granule : 1;
  const int64_t wanted = f >= 16384 ? 32 : f >= 4096 ? 16 : 8;
  return std::max<int64_t>(wanted / granule, 1) * granule;
}

// Hands out pieces of the scratch memory; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* Take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += RoundUp(count * static_cast<int64_t>(sizeof(T)), 256);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Prior {
  float* ratio = nullptr;   // [batch, E], with use_stat
  float* factor = nullptr;  // [batch, E], with use_stat and prior_gamma > 0
};

// The sum over neurons is cut three times, by sizes alone: a range of neurons belongs to a block; its cells, to groups of a block's
// threads (narrow rows leave threads over); parts are runs of cells. A cell's neurons are added in their order, then a part's
// cells, then the parts. One row writes a partial result for each cell; several rows write one for each part (see decode.cu).
struct DecodePlan {
  int64_t group = 0;   // rows that are computed at a time, padded
  int64_t range = 0;
  int64_t blocks = 0;  // ranges
  int64_t groups = 0;  // cells of a range
  int64_t cell = 0;    // neurons of a cell
  int64_t parts = 0;
  Prior prior;
  float* x = nullptr;          // [group, RoundUp(d, 256)], as Dot reads it
  float* shadow_x = nullptr;   // [group, RoundUp(d, 1024)], as ShadowDot reads it
  float* shadow_sum = nullptr;  // [group, RoundUp(d, 1024) / 32]: sums over the shadow's blocks
  float* score = nullptr;      // [rows, f], when not local
  float* granule_score = nullptr;  // [rows, E], when not local
  float* known = nullptr;      // [rows, f] gates or hidden values that the scores brought along, when not local
  uint8_t* mask = nullptr;     // [rows, E], when not local
  float* hidden = nullptr;     // [rows, f], with emit_stat
  float* energy = nullptr;     // [rows] what a row's h^2 is divided by, with emit_stat; 0: the row is not counted
  float* contribution = nullptr;  // [group, f] hidden values of chosen neurons, several rows; 0 where a row does not need it
  uint8_t* chosen = nullptr;   // [f]: some row needs the neuron; several rows
  float* partial = nullptr;    // [cells, d], one row; [parts, rows, d], several
  int32_t* count = nullptr;    // [blocks, rows]

  CLADA_ANYWHERE int64_t cells() const { return blocks * groups; }
};

struct PromptPlan {
  int64_t panel = 0;  // rows of one pass
  Prior prior;
  void* x = nullptr;           // [panel, d] in the weights' type, when x has another
  float* shadow_x = nullptr;   // [RoundUp(panel, 16), RoundUp(d, 1024)]
  float* shadow_sum = nullptr;
  float* pre = nullptr;        // [panel, f, n]
  float* score = nullptr;      // [panel, f]
  float* granule_score = nullptr;  // [panel, E]
  uint8_t* mask = nullptr;     // [panel, E]
  void* hidden = nullptr;      // [panel, f] in the weights' type
  float* energy = nullptr;     // [panel], as above; without meaning where load is not +inf
  float* out = nullptr;        // [panel, d]
  void* gemm = nullptr;
};

inline Prior PlanPrior(const Problem& problem, Arena* arena) {
  Prior prior;
  if (!problem.attributes.use_stat) return prior;
  prior.ratio = arena->Take<float>(problem.batch * problem.granules());
  if (problem.attributes.prior_gamma > 0.0f) prior.factor = arena->Take<float>(problem.batch * problem.granules());
  return prior;
}

inline int64_t PlanDecode(const Problem& problem, int64_t rows, void* base, DecodePlan* plan) {
  const Attributes& a = problem.attributes;
  const int64_t d = problem.hidden_size, f = problem.intermediate_size, granules = problem.granules();
  Arena arena(base);
  plan->group = RowGroup(rows);
  plan->range = Range(problem);
  plan->blocks = CeilDiv(f, plan->range);
  const int64_t pieces = CeilDiv(d, kColumns);
  plan->groups = pieces >= kThreads ? 1 : std::min(kThreads / pieces, plan->range);
  plan->cell = CeilDiv(plan->range, plan->groups);
  plan->parts = std::min<int64_t>(kMaxParts, plan->cells());
  plan->prior = PlanPrior(problem, &arena);
  plan->x = arena.Take<float>(plan->group * RoundUp(d, kWarpWeights));
  if (a.score == Score::kShadow) {
    plan->shadow_x = arena.Take<float>(plan->group * RoundUp(d, kShadowWeights));
    plan->shadow_sum = arena.Take<float>(plan->group * RoundUp(d, kShadowWeights) / kShadowBlock);
  }
  if (!IsLocal(a)) {
    plan->score = arena.Take<float>(rows * f);
    plan->granule_score = arena.Take<float>(rows * granules);
    plan->mask = arena.Take<uint8_t>(rows * granules);
    if (a.score == Score::kGate || a.score == Score::kExact) plan->known = arena.Take<float>(rows * f);
  }
  if (a.emit_stat) {
    plan->hidden = arena.Take<float>(rows * f);
    plan->energy = arena.Take<float>(rows);
  }
  if (plan->group > 1) {
    plan->contribution = arena.Take<float>(plan->group * f);
    plan->chosen = arena.Take<uint8_t>(f);
  }
  plan->partial = arena.Take<float>((plan->group > 1 ? plan->parts * rows : plan->cells()) * d);
  plan->count = arena.Take<int32_t>(plan->blocks * rows);
  return arena.used();
}

inline int64_t PlanPrompt(const Problem& problem, int64_t rows, size_t gemm_bytes, void* base, PromptPlan* plan) {
  const Attributes& a = problem.attributes;
  const int64_t d = problem.hidden_size, f = problem.intermediate_size, n = problem.projections();
  const int64_t granules = problem.granules(), weight = SizeOf(problem.weight_type);
  const bool shadow = a.score == Score::kShadow;
  const int64_t row_bytes = 4 * ((n + 1) * f + d) + 5 * granules + weight * (f + d) + (shadow ? 5 * RoundUp(d, kShadowWeights) : 0);
  const int64_t fit = kPanelBytes / row_bytes / kPanelRows * kPanelRows;
  Arena arena(base);
  const int64_t panel = plan->panel = std::min({rows, std::max(fit, kPanelRows), kMostPanelRows});
  plan->prior = PlanPrior(problem, &arena);
  if (problem.x_type != problem.weight_type) plan->x = arena.Take<char>(panel * d * weight);
  if (shadow) {
    const int64_t padded = RoundUp(panel, kDecodeRows) * RoundUp(d, kShadowWeights);
    plan->shadow_x = arena.Take<float>(padded);
    plan->shadow_sum = arena.Take<float>(padded / kShadowBlock);
  }
  plan->pre = arena.Take<float>(panel * f * n);
  plan->score = arena.Take<float>(panel * f);
  plan->granule_score = arena.Take<float>(panel * granules);
  plan->mask = arena.Take<uint8_t>(panel * granules);
  plan->hidden = arena.Take<char>(panel * f * weight);
  plan->energy = arena.Take<float>(panel);
  plan->out = arena.Take<float>(panel * d);
  plan->gemm = arena.Take<char>(static_cast<int64_t>(gemm_bytes));
  return arena.used();
}

}  // namespace clada::cuda

#endif  // CLADA_CUDA_PLAN_H_
