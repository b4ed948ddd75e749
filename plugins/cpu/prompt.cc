// SPDX-License-Identifier: Apache-2.0
// Many dense rows (prompts): two products of matrices on the weights as they lie, the activation in between. Every sum is made of
// the same numbers in the same order as in direct.cc, so a row has the same bits whichever way it went.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "plan.h"

namespace clada {
namespace {

constexpr int64_t kStatColumns = 256;  // neurons of one task of the statistic
constexpr int64_t kPanelNeurons = 64;  // of one panel of w_out: 12 KB, which stay in the L1 cache
constexpr int64_t kAxpyRows = 256;     // rows of one task that use it, at most
constexpr int64_t kAxpyTasks = 24;     // tasks that there should be

// One pass over some dense rows.
class Prompt {
 public:
  Prompt(const Problem& problem, const Host& host, const Plan& plan, const int32_t* rows, int64_t count)
      : problem_(problem),
        a_(problem.attributes),
        host_(host),
        k_(*host.kernels),
        plan_(plan),
        rows_(rows),
        count_(count),
        d_(problem.hidden_size),
        f_(problem.intermediate_size),
        n_(problem.projections()),
        type_(static_cast<int>(problem.weight_type)) {}

  void Run() const {
    Parallel(host_, CeilDiv(count_, kRunRows), [&](int64_t run) {
      const int64_t i = run * kRunRows;
      k_.pack_x(Rows(problem_), rows_ + i, std::min(kRunRows, count_ - i), d_, plan_.x + i * PackedSize(d_));
    });
    Hidden();
    if (a_.emit_stat) AddStat();
    if (a_.combine == Combine::kWeighted) Parallel(host_, count_, [&](int64_t i) { Weigh(i); });
    // Narrow layers have few panels of columns: there rows are cut too, so that there is work for eight threads.
    const int64_t columns = CeilDiv(d_, kPanelColumns), cuts = CeilDiv(kAxpyTasks, columns);
    const int64_t rows = std::clamp(RoundUp(CeilDiv(count_, cuts), kRunRows), kAxpyRows / 8, kAxpyRows);
    Parallel(host_, columns * CeilDiv(count_, rows), [&](int64_t task) {
      const int64_t first = task / columns * rows;
      Down(task % columns * kPanelColumns, first, std::min(rows, count_ - first));
    });
    if (problem_.active)
      for (int64_t i = 0; i < count_; ++i) problem_.active[rows_[i]] = static_cast<int32_t>(f_);
  }

 private:
  float* HiddenRow(int64_t i) const { return plan_.hidden_rows + i * f_; }

  // The hidden values. A slot packs weights and uses them up, panel after panel, so that its memory stays in a core's cache. Who
  // takes which panel does not matter to the numbers.
  void Hidden() const {
    const int64_t neurons = kPanelColumns / n_, panels = CeilDiv(f_, neurons);
    std::atomic<int64_t> next{0};
    Parallel(host_, plan_.slots, [&](int64_t slot) {
      float* packed = plan_.weights + slot * kPanelColumns * PackedSize(d_);
      for (int64_t panel = next++; panel < panels; panel = next++) Panel(panel * neurons, std::min(neurons, f_ - panel * neurons), packed);
    });
  }

  void Panel(int64_t first, int64_t size, float* packed) const {
    alignas(64) float pre[kRunRows * kPanelColumns], hidden[kRunRows * kPanelColumns];
    const int64_t width = kPanelColumns / n_;
    k_.pack_rows[type_](WeightAt(problem_, problem_.w_in, first * n_ * d_), d_, size * n_, packed);
    for (int64_t i = 0; i < count_; i += kRunRows) {
      const int64_t rows = std::min(kRunRows, count_ - i);
      k_.dot_block(plan_.x + i * PackedSize(d_), rows, packed, d_, pre);
      if (a_.has_bias)
        for (int64_t r = 0; r < rows; ++r) k_.add(plan_.bias + first * n_, size * n_, pre + r * kPanelColumns);
      k_.activate(a_.activation, a_.gated, pre, rows * width, hidden);
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(HiddenRow(i + r) + first, hidden + r * width, static_cast<size_t>(size) * sizeof(float));
    }
  }

  void AddStat() const {
    Parallel(host_, count_, [&](int64_t i) {
      const bool counts = plan_.kind[rows_[i]] == kPromptRow;
      plan_.energy[i] = counts ? a_.stat_norm == StatNorm::kRow ? Energy(HiddenRow(i), f_) : 1.0f : 0.0f;
    });
    Parallel(host_, CeilDiv(f_, kStatColumns), [&](int64_t task) {
      const int64_t j = task * kStatColumns;
      for (int64_t i = 0; i < count_; ++i)
        AddShare(HiddenRow(i) + j, std::min(kStatColumns, f_ - j), plan_.energy[i],
                 problem_.stat + rows_[i] / problem_.sequence * f_ + j);
    });
  }

  void Weigh(int64_t i) const {
    const int64_t at = problem_.score_per_sequence ? rows_[i] / problem_.sequence : rows_[i];
    const float* score = problem_.score + at * problem_.granules();
    float* hidden = HiddenRow(i);
    for (int64_t j = 0; j < f_; ++j) hidden[j] *= score[j / a_.granule];
  }

  // Some columns of y, of rows [first, first + count). A chunk's sum is made before it is added to the others'.
  void Down(int64_t column, int64_t first, int64_t count) const {
    alignas(64) float panel[kPanelNeurons * kPanelColumns];
    alignas(64) float part[kAxpyRows * kPanelColumns];
    float start[kPanelColumns] = {};
    const int64_t columns = std::min(kPanelColumns, d_ - column);
    float* y = Results(problem_) + column;
    if (a_.has_bias) std::memcpy(start, problem_.down_bias + column, static_cast<size_t>(columns) * sizeof(float));
    for (int64_t chunk = 0; chunk < f_; chunk += plan_.chunk) {
      const int64_t end = std::min(f_, chunk + plan_.chunk);
      for (int64_t j = chunk; j < end; j += kPanelNeurons) {
        const int64_t size = std::min(kPanelNeurons, end - j);
        k_.pack_columns[type_](WeightAt(problem_, problem_.w_out, j * d_ + column), d_, size, columns, panel);
        k_.axpy_block(HiddenRow(first) + j, f_, count, panel, size, {j == chunk, j + size == end, chunk == 0 ? start : nullptr}, part, y, rows_ + first, d_,
                      columns);
      }
    }
  }

  const Problem& problem_;
  const Attributes& a_;
  const Host& host_;
  const Kernels& k_;
  const Plan& plan_;
  const int32_t* rows_;
  const int64_t count_, d_, f_, n_;
  const int type_;
};

}  // namespace

void RunPrompt(const Problem& problem, const Host& host, const Plan& plan, const int32_t* rows, int64_t count) {
  Prompt(problem, host, plan, rows, count).Run();
}

}  // namespace clada
