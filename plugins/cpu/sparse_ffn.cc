// SPDX-License-Identifier: Apache-2.0
#include "clada/sparse_ffn.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ffn_quant.h"
#include "plan.h"

namespace clada {
namespace {

// The prior and the prefix score: functions of the sequence's statistic alone.
void MakePrior(const Problem& problem, const Kernels& kernels, const Plan& plan, int64_t sequence) {
  const Attributes& a = problem.attributes;
  const int64_t f = problem.intermediate_size, granules = problem.granules();
  const float* stat = problem.past_stat + sequence * f;
  float lanes[8] = {};
  for (int64_t j = 0; j < f; ++j) lanes[j % 8] += std::sqrt(stat[j]);
  float mean = 0.0f;
  for (const float lane : lanes) mean += lane;
  mean /= static_cast<float>(f);
  float* prior = plan.prior + sequence * granules;
  for (int64_t e = 0; e < granules; ++e) {
    float sum = 0.0f;
    for (int64_t j = e * a.granule; j < (e + 1) * a.granule; ++j) sum += mean > 0.0f ? std::sqrt(stat[j]) / mean : 1.0f;
    prior[e] = sum / static_cast<float>(a.granule);
  }
  if (plan.prior_factor) kernels.inverse_power(prior, granules, a.prior_gamma, plan.prior_factor + sequence * granules);
  if (plan.prefix)
    for (int64_t j = 0; j < f; ++j) plan.prefix[sequence * f + j] = std::sqrt(stat[j]);
}

}  // namespace

float Energy(const float* hidden, int64_t count) {
  float lanes[8] = {};
  int64_t j = 0;
  for (; j + 8 <= count; j += 8)
    for (int k = 0; k < 8; ++k) lanes[k] += hidden[j + k] * hidden[j + k];
  for (; j < count; ++j) lanes[0] += hidden[j] * hidden[j];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

void AddShare(const float* hidden, int64_t count, float total, float* stat) {
  if (!(total > 0.0f)) return;
  for (int64_t j = 0; j < count; ++j) stat[j] += hidden[j] * hidden[j] / total;
}

size_t MakePlan(const Problem& problem, void* base, Plan* plan) {
  const Attributes& a = problem.attributes;
  const int64_t rows = problem.rows(), d = problem.hidden_size, f = problem.intermediate_size, n = problem.projections();
  const int64_t granules = problem.granules();

  // About 32 tasks: enough to balance eight threads, few enough that their partial sums cost little.
  plan->two_pass = a.rule != Rule::kThreshold || a.granule > kBlockNeurons;
  plan->chunk = RoundUp(std::max<int64_t>(kBlockNeurons, CeilDiv(f, 32)), plan->two_pass ? 1 : a.granule);
  plan->chunks = CeilDiv(f, plan->chunk);
  plan->block_rows = std::min(rows, kBlockRows);

  Arena arena(base);
  plan->kind = arena.Take<uint8_t>(rows);
  plan->multiplier = arena.Take<float>(rows);
  plan->order = arena.Take<int32_t>(rows);
  if (a.use_stat) {
    plan->prior = arena.Take<float>(problem.batch * granules);
    if (a.prior_gamma > 0.0f) plan->prior_factor = arena.Take<float>(problem.batch * granules);
    if (a.score == Score::kPrefix) plan->prefix = arena.Take<float>(problem.batch * f);
  }
  const size_t shared = arena.used();
  const int64_t block = plan->block_rows;
  if (a.score == Score::kShadow) plan->folded = arena.Take<float>(block * (d / (kShadowBlock / 2)));
  plan->score = arena.Take<float>(block * f);
  plan->hidden = arena.Take<float>(block * f);
  if (a.score == Score::kGate && a.gated) plan->gate = arena.Take<float>(block * f);
  plan->mask = arena.Take<uint8_t>(block * granules);
  if (a.rule == Rule::kTopk) plan->rank = arena.Take<uint64_t>(block * granules);
  plan->partial = arena.Take<float>(plan->chunks * block * d);
  plan->count = arena.Take<int32_t>(plan->chunks * block);

  if (rows < kPromptRows) return arena.most();
  arena.Rewind(shared);  // direct rows are done when the prompt's come
  // A quarter of the budget for packed weights; the rest for rows.
  const int64_t slot_size = kPanelColumns * PackedSize(d), slot_bytes = slot_size * static_cast<int64_t>(sizeof(float));
  const int64_t fit = std::clamp<int64_t>(static_cast<int64_t>(kPromptBytes / 4) / slot_bytes, 16, 64);
  plan->slots = std::min(CeilDiv(f, kPanelColumns / n), fit);
  const int64_t row_budget = static_cast<int64_t>(kPromptBytes) * 3 / 4 / ((f + d) * static_cast<int64_t>(sizeof(float)));
  plan->panel_rows = std::min(rows, std::max<int64_t>(64, row_budget / 64 * 64));
  plan->x = arena.Take<float>(plan->panel_rows * PackedSize(d));
  plan->hidden_rows = arena.Take<float>(plan->panel_rows * f);
  plan->weights = arena.Take<float>(plan->slots * slot_size);
  if (a.has_bias) plan->bias = arena.Take<float>(n * f);
  plan->energy = arena.Take<float>(plan->panel_rows);
  return arena.most();
}

namespace {

// x and y in float32, before the plan's own scratch memory, when they are not float32 already.
size_t WideBytes(const Problem& problem) {
  if (problem.x_type == FloatType::kFloat32) return 0;
  return static_cast<size_t>(RoundUp(2 * problem.rows() * problem.hidden_size * 4, 64));
}

void RunWide(const Problem& problem, const Host& host, void* scratch) {
  const int64_t rows = problem.rows(), d = problem.hidden_size, f = problem.intermediate_size, n = problem.projections();
  const Attributes& a = problem.attributes;
  if (a.emit_stat && problem.batch > 0) {
    const size_t bytes = static_cast<size_t>(problem.batch * f) * sizeof(float);
    a.use_stat ? std::memcpy(problem.stat, problem.past_stat, bytes) : std::memset(problem.stat, 0, bytes);
  }
  if (rows == 0) return;
  Plan plan;
  MakePlan(problem, scratch, &plan);
  if (a.use_stat)
    Parallel(host, problem.batch, [&](int64_t b) { MakePrior(problem, *host.kernels, plan, b); });

  int64_t dense = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float load = ReadOnce(problem.load + r);
    plan.kind[r] = KindOf(load);
    plan.multiplier[r] = plan.kind[r] == kSparseRow ? LoadMultiplier(a, load) : 1.0f;
    dense += plan.kind[r] == kDenseRow || plan.kind[r] == kPromptRow;
  }
  int32_t* order = plan.order;
  const auto list = [&](auto wanted) {
    int32_t* const first = order;
    for (int64_t r = 0; r < rows; ++r)
      if (wanted(plan.kind[r])) *order++ = static_cast<int32_t>(r);
    return order - first;
  };
  const bool prompt = dense >= kPromptRows;
  const int64_t direct_rows = list([&](uint8_t kind) { return kind == kSparseRow || (kind != kPaddingRow && !prompt); });
  const int64_t prompt_rows = list([&](uint8_t kind) { return prompt && (kind == kDenseRow || kind == kPromptRow); });
  for (int64_t r = 0; r < rows; ++r) {
    if (plan.kind[r] != kPaddingRow) continue;
    std::memset(Results(problem) + r * d, 0, static_cast<size_t>(d) * sizeof(float));
    if (problem.active) problem.active[r] = 0;
  }

  for (int64_t done = 0; done < direct_rows; done += plan.block_rows)
    RunDirect(problem, host, plan, plan.order + done, std::min(plan.block_rows, direct_rows - done));
  if (prompt && a.has_bias)
    for (int64_t j = 0; j < f; ++j) {
      if (a.gated) plan.bias[2 * j] = problem.gate_bias[j];
      plan.bias[n * j + n - 1] = problem.up_bias[j];
    }
  for (int64_t done = 0; done < prompt_rows; done += plan.panel_rows)
    RunPrompt(problem, host, plan, plan.order + direct_rows + done, std::min(plan.panel_rows, prompt_rows - done));
}

}  // namespace

RowKind KindOf(float load) {
  if (std::isnan(load)) return kDenseRow;
  if (!std::isinf(load)) return kSparseRow;
  return load > 0 ? kPromptRow : kPaddingRow;
}

size_t ScratchBytes(const Problem& problem) {
  if (problem.quantised()) return quant::FfnScratchBytes(problem);
  Plan plan;
  return WideBytes(problem) + MakePlan(problem, nullptr, &plan);
}

void RunSparseFFN(const Problem& problem, const Host& host, void* scratch) {
  if (problem.quantised()) return quant::RunFfn(problem, host, scratch);
  if (problem.x_type == FloatType::kFloat32) return RunWide(problem, host, scratch);
  const int64_t rows = problem.rows(), d = problem.hidden_size;
  float* x = static_cast<float*>(scratch);
  Problem wide = problem;
  wide.x_type = FloatType::kFloat32;
  wide.x = x;
  wide.y = x + rows * d;
  const auto* source = static_cast<const uint16_t*>(problem.x);
  auto* target = static_cast<uint16_t*>(problem.y);
  const int type = static_cast<int>(problem.x_type);
  Parallel(host, rows, [&](int64_t r) { host.kernels->convert[type](source + r * d, d, x + r * d); });
  RunWide(wide, host, static_cast<char*>(scratch) + WideBytes(problem));
  Parallel(host, rows, [&](int64_t r) { Narrow(problem.x_type, Results(wide) + r * d, d, target + r * d); });
}

}  // namespace clada
