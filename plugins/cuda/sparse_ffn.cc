// SPDX-License-Identifier: Apache-2.0
// One call: the order of the kernels.
#include <cuda_runtime_api.h>

#include "clada/sparse_ffn_cuda.h"
#include "kernels.h"

namespace clada::cuda {
namespace {

// Remembers the first launch that failed, and what it was for.
class Steps {
 public:
  void operator()(const char* step, cudaError_t status) {
    if (error_.empty() && status != cudaSuccess)
      error_ = std::string(step) + ": " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ")";
  }
  void operator()(const char* step, const std::string& error) {
    if (error_.empty() && !error.empty()) error_ = std::string(step) + ": " + error;
  }
  bool failed() const { return !error_.empty(); }
  const std::string& error() const { return error_; }

 private:
  std::string error_;
};

void RunDecode(const Problem& problem, void* workspace, cudaStream_t stream, Steps* step) {
  const Attributes& a = problem.attributes;
  const int64_t rows = problem.rows();
  DecodePlan plan;
  PlanDecode(problem, rows, workspace, &plan);
  if (a.use_stat) (*step)("prior", LaunchPrior(problem, plan.prior, stream));
  (*step)("x", LaunchSpreadX(problem, 0, rows, plan.group, plan.x, stream));
  if (a.score == Score::kShadow)
    (*step)("shadow x", LaunchSpreadShadowX(problem, 0, rows, plan.group, plan.shadow_x, plan.shadow_sum, stream));
  if (!IsLocal(a)) {
    if (a.score != Score::kPrefix && a.score != Score::kExternal) (*step)("scores", LaunchScores(problem, plan, stream));
    (*step)("rule", LaunchSelect(problem, plan, stream));
  }
  (*step)("neurons", LaunchSparseFFN(problem, plan, stream));
  (*step)("sum", LaunchReduce(problem, plan, stream));
  if (a.emit_stat) {
    (*step)("energy", LaunchEnergy(problem, 0, rows, plan.hidden, plan.energy, stream));
    (*step)("statistic", LaunchAddStat(problem, 0, rows, plan.hidden, nullptr, plan.energy, stream));
  }
}

void RunPanel(const Problem& problem, const Gemm& gemm, const PromptPlan& plan, int64_t first, int64_t rows, cudaStream_t stream,
              Steps* step) {
  const Attributes& a = problem.attributes;
  const int64_t d = problem.hidden_size, f = problem.intermediate_size, n = problem.projections();
  const FloatType type = problem.weight_type;
  const auto multiply = [&](const char* name, bool transpose_b, int64_t columns, int64_t inner, const void* left,
                            const void* right, float* out) {
    if (gemm.run)
      (*step)(name, gemm.run(gemm.host, stream, transpose_b, rows, columns, inner, type, left, right, out, plan.gemm,
                             gemm.workspace_bytes));
    else
      (*step)(name, LaunchGemm(transpose_b, rows, columns, inner, type, left, right, out, stream));
  };
  const void* x = static_cast<const char*>(problem.x) + first * d * SizeOf(problem.x_type);
  if (plan.x) {
    (*step)("x", LaunchConvertX(problem, first, rows, plan.x, stream));
    x = plan.x;
  }
  multiply("GEMM of gate and up", true, n * f, d, x, problem.w_in, plan.pre);
  if (a.score == Score::kShadow) {
    const int64_t padded = RoundUp(rows, kDecodeRows);
    (*step)("shadow x", LaunchSpreadShadowX(problem, first, rows, padded, plan.shadow_x, plan.shadow_sum, stream));
    (*step)("scores", LaunchShadowScores(problem, plan, first, rows, stream));
  }
  (*step)("neurons", LaunchPromptHidden(problem, plan, first, rows, stream));
  if (a.emit_stat) (*step)("statistic", LaunchAddStat(problem, first, rows, nullptr, plan.pre, plan.energy, stream));
  multiply("GEMM of down", false, d, f, plan.hidden, problem.w_out, plan.out);
  (*step)("y", LaunchFinish(problem, first, rows, plan.out, stream));
}

}  // namespace

std::string CheckLimits(const Problem& problem) {
  constexpr int64_t kMost = INT32_MAX;
  const auto over = [](const char* what, int64_t found) {
    return std::string(what) + " is " + std::to_string(found) + "; the kernels index at most " + std::to_string(kMost);
  };
  const int64_t d = problem.hidden_size, f = problem.intermediate_size, n = problem.projections();
  // Weights are indexed with 64 bits; what is counted in 32 is one neuron's rows, one row of neurons, and rows.
  if (n * d > kMost - kShadowWeights) return over("n * hidden_size", n * d);
  if (n * f > kMost) return over("n * intermediate_size", n * f);
  if (problem.batch > 65535) return "batch is " + std::to_string(problem.batch) + "; at most 65535 sequences fit a launch";
  if (problem.rows() > kMost) return over("batch * sequence", problem.rows());
  // A thread of the statistic has one neuron of one sequence; a launch, at most 2^31 - 1 blocks of them.
  if (problem.batch * f > kMost * kThreads) return over("batch * intermediate_size / 256", problem.batch * f / kThreads);
  return {};
}

size_t WorkspaceBytes(const Problem& problem, const Gemm& gemm) {
  const int64_t rows = problem.rows();
  if (rows == 0) return 0;
  DecodePlan decode;
  int64_t bytes = PlanDecode(problem, std::min(rows, kDecodeRows), nullptr, &decode);
  if (rows > kDecodeRows) {
    PromptPlan prompt;
    bytes = std::max(bytes, PlanPrompt(problem, rows, gemm.workspace_bytes, nullptr, &prompt));
  }
  return static_cast<size_t>(bytes);
}

std::string RunSparseFFN(const Problem& problem, const Gemm& gemm, void* workspace, CUstream_st* stream) {
  Steps step;
  if (problem.attributes.emit_stat && problem.batch > 0) step("statistic", LaunchStartStat(problem, stream));
  const int64_t rows = problem.rows();
  if (rows == 0 || step.failed()) return step.error();
  if (rows <= kDecodeRows) {
    RunDecode(problem, workspace, stream, &step);
    return step.error();
  }
  PromptPlan plan;
  PlanPrompt(problem, rows, gemm.workspace_bytes, workspace, &plan);
  if (problem.attributes.use_stat) step("prior", LaunchPrior(problem, plan.prior, stream));
  for (int64_t first = 0; first < rows && !step.failed(); first += plan.panel)
    RunPanel(problem, gemm, plan, first, std::min(plan.panel, rows - first), stream, &step);
  return step.error();
}

}  // namespace clada::cuda
