// SPDX-License-Identifier: Apache-2.0
// Many dense rows (prompts): two GEMMs on the weights as they lie, the activation in between.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "plan.h"

namespace clada {
namespace {

constexpr int64_t kColumns = 256;  // neurons of one task of the statistic

// Without a host: correct, and fast enough for tests. [k, n] weights are walked row by row.
void SimpleGemm(const Host& host, bool transpose_b, int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c) {
  const Kernels& kernels = *host.kernels;
  Parallel(host, m, [&](int64_t row) {
    const float* x = a + row * k;
    float* out = c + row * n;
    if (transpose_b) {
      kernels.dot[0](x, b, k, k, 1, nullptr, n, out);
    } else {
      std::memset(out, 0, static_cast<size_t>(n) * sizeof(float));
      kernels.axpy[0](x, b, n, nullptr, k, out);
    }
  });
}

void RunGemm(const Host& host, bool transpose_b, int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c) {
  if (host.gemm.run)
    host.gemm.run(host.gemm.host, transpose_b, m, n, k, a, b, c);
  else
    SimpleGemm(host, transpose_b, m, n, k, a, b, c);
}

// `count` weights from element `at` as float32: the memory itself, or a copy.
const float* Weights(const Problem& problem, const Host& host, const Plan& plan, const void* weights, int64_t at,
                     int64_t rows, int64_t width) {
  const char* source = WeightAt(problem, weights, at);
  if (problem.weight_type == FloatType::kFloat32) return reinterpret_cast<const float*>(source);
  Parallel(host, rows, [&](int64_t row) {
    host.kernels->convert[static_cast<int>(problem.weight_type)](source + row * width * 2, width, plan.weights + row * width);
  });
  return plan.weights;
}

}  // namespace

void RunPrompt(const Problem& problem, const Host& host, const Plan& plan, const int32_t* rows, int64_t count) {
  const Attributes& a = problem.attributes;
  const Kernels& kernels = *host.kernels;
  const int64_t d = problem.hidden_size, f = problem.intermediate_size, n = problem.projections();
  const size_t row_bytes = static_cast<size_t>(d) * sizeof(float);

  // Neighbouring rows are used where they lie.
  const bool neighbours = rows[count - 1] - rows[0] == count - 1;
  const float* x = Rows(problem) + rows[0] * d;
  float* y = Results(problem) + rows[0] * d;
  if (!neighbours) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(plan.gathered_x + i * d, Rows(problem) + rows[i] * d, row_bytes);
    x = plan.gathered_x;
    y = plan.gathered_y;
  }
  if (a.has_bias)
    for (int64_t j = 0; j < f; ++j) {
      if (a.gated) plan.bias[2 * j] = problem.gate_bias[j];
      plan.bias[n * j + n - 1] = problem.up_bias[j];
    }

  // hidden of panel p lies at count * first neuron, [count, neurons of p].
  for (int64_t first = 0; first < f; first += plan.panel_neurons) {
    const int64_t size = std::min(plan.panel_neurons, f - first);
    const float* weights = Weights(problem, host, plan, problem.w_in, first * n * d, size * n, d);
    RunGemm(host, true, count, n * size, d, x, weights, plan.pre);
    Parallel(host, count, [&](int64_t i) {
      float* pre = plan.pre + i * n * size;
      if (a.has_bias) kernels.add(plan.bias + n * first, n * size, pre);
      kernels.activate(a.activation, a.gated, pre, size, plan.act + count * first + i * size);
    });
  }

  if (a.emit_stat) {
    const auto panel = [&](int64_t j) { return j / plan.panel_neurons * plan.panel_neurons; };
    Parallel(host, count, [&](int64_t i) {
      float total = 1.0f;
      if (a.stat_norm == StatNorm::kRow) {
        total = 0.0f;
        for (int64_t first = 0; first < f; first += plan.panel_neurons) {
          const int64_t size = std::min(plan.panel_neurons, f - first);
          total += Energy(plan.act + count * first + i * size, size);
        }
      }
      plan.energy[i] = problem.load[rows[i]] == HUGE_VALF ? total : 0.0f;  // NaN loads are dense, but no prompt
    });
    Parallel(host, (f + kColumns - 1) / kColumns, [&](int64_t task) {
      for (int64_t j = task * kColumns; j < std::min(f, (task + 1) * kColumns);) {
        const int64_t first = panel(j), size = std::min(plan.panel_neurons, f - first);
        const int64_t part = std::min({first + size - j, (task + 1) * kColumns - j, f - j});
        for (int64_t i = 0; i < count; ++i)
          AddShare(plan.act + count * first + i * size + (j - first), part, plan.energy[i],
                   problem.stat + rows[i] / problem.sequence * f + j);
        j += part;
      }
    });
  }

  if (a.combine == Combine::kWeighted)
    Parallel(host, count, [&](int64_t i) {
      const int64_t at = problem.score_per_sequence ? rows[i] / problem.sequence : rows[i];
      const float* score = problem.score + at * problem.granules();
      for (int64_t first = 0; first < f; first += plan.panel_neurons) {
        const int64_t size = std::min(plan.panel_neurons, f - first);
        float* hidden = plan.act + count * first + i * size;
        for (int64_t j = 0; j < size; ++j) hidden[j] *= score[(first + j) / a.granule];
      }
    });

  for (int64_t first = 0; first < f; first += plan.panel_neurons) {
    const int64_t size = std::min(plan.panel_neurons, f - first);
    const float* weights = Weights(problem, host, plan, problem.w_out, first * d, size, d);
    float* out = first == 0 ? y : plan.part_y;
    RunGemm(host, false, count, d, size, plan.act + count * first, weights, out);
    if (first > 0) Parallel(host, count, [&](int64_t i) { kernels.add(plan.part_y + i * d, d, y + i * d); });
  }
  for (int64_t i = 0; i < count; ++i) {
    if (a.has_bias) kernels.add(problem.down_bias, d, y + i * d);
    if (!neighbours) std::memcpy(Results(problem) + rows[i] * d, y + i * d, row_bytes);
    if (problem.active) problem.active[rows[i]] = static_cast<int32_t>(f);
  }
}

}  // namespace clada
