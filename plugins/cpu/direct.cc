// SPDX-License-Identifier: Apache-2.0
// Few rows (decode): neuron by neuron, reading only what is needed. Memory bandwidth is the limit, so a task walks over its
// neurons in blocks whose weights stay in the core's cache while the rows take turns.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "plan.h"

namespace clada {
namespace {

constexpr int64_t kMaxBlock = 2 * kBlockNeurons;

// One pass over some rows.
class Direct {
 public:
  Direct(const Problem& problem, const Host& host, const Plan& plan, const int32_t* rows, int64_t count)
      : problem_(problem),
        a_(problem.attributes),
        k_(*host.kernels),
        plan_(plan),
        rows_(rows),
        count_(count),
        d_(problem.hidden_size),
        f_(problem.intermediate_size),
        n_(problem.projections()),
        type_(static_cast<int>(problem.weight_type)) {
    // Rows in full do not need a score, unless it weighs them; that one is an input.
    for (int64_t i = 0; i < count; ++i) any_sparse_ |= plan.kind[rows[i]] == kSparseRow;
    block_ = kBlockNeurons;
    if (count > 1) {
      const int64_t neuron_bytes = (n_ + 1) * d_ * SizeOf(problem.weight_type);
      block_ = std::min(block_, std::max<int64_t>(8, static_cast<int64_t>(kBlockBytes) / neuron_bytes));
      block_ = CeilDiv(plan.chunk, CeilDiv(plan.chunk, block_));  // all of a size: a small one at the end would cost as much
    }
    if (!plan.two_pass && a_.granule > 1) block_ = std::max<int64_t>(1, block_ / a_.granule) * a_.granule;
  }

  void Run(const Host& host) {
    const bool computed = a_.score != Score::kPrefix && a_.score != Score::kExternal;
    if (a_.score == Score::kShadow)
      for (int64_t i = 0; i < count_; ++i) k_.fold(Row(i), d_, Folded(i));
    if (plan_.two_pass && any_sparse_) {
      if (computed)
        Parallel(host, plan_.chunks, [&](int64_t c) {
          EachBlock(c, [&](int64_t j, int64_t size) {
            for (int64_t i = 0; i < count_; ++i)
              if (Sparse(i)) ScoreBlock(i, j, size);
          });
        });
      Parallel(host, count_, [&](int64_t i) {
        if (Sparse(i)) DecideBlock(i, 0, f_);
      });
    }
    Parallel(host, plan_.chunks, [&](int64_t c) { Chunk(c, computed); });
    for (int64_t i = 0; i < count_; ++i) Finish(i);
  }

 private:
  const float* Row(int64_t i) const { return Rows(problem_) + rows_[i] * d_; }
  bool Sparse(int64_t i) const { return plan_.kind[rows_[i]] == kSparseRow; }
  int64_t Sequence(int64_t i) const { return rows_[i] / problem_.sequence; }
  float* Folded(int64_t i) const { return plan_.folded + i * (d_ / (kShadowBlock / 2)); }
  const float* External(int64_t i) const {
    return problem_.score + (problem_.score_per_sequence ? Sequence(i) : rows_[i]) * problem_.granules();
  }

  template <class Body>
  void EachBlock(int64_t chunk, const Body& body) const {
    const int64_t end = std::min(f_, (chunk + 1) * plan_.chunk);
    for (int64_t j = chunk * plan_.chunk; j < end; j += block_) body(j, std::min(block_, end - j));
  }

  void Chunk(int64_t chunk, bool computed) const {
    int32_t* counts = plan_.count + chunk * plan_.block_rows;
    for (int64_t i = 0; i < count_; ++i) counts[i] = 0;
    EachBlock(chunk, [&](int64_t j, int64_t size) {
      for (int64_t i = 0; i < count_; ++i) {
        if (Sparse(i) && !plan_.two_pass) {
          if (computed) ScoreBlock(i, j, size);
          DecideBlock(i, j, size);
        }
        ComputeBlock(i, j, size, plan_.partial + (chunk * plan_.block_rows + i) * d_, &counts[i]);
      }
    });
  }

  void AddBias(int64_t j, const int32_t* list, int64_t count, float* pre) const {
    if (!a_.has_bias) return;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t neuron = j + (list ? list[i] : i);
      if (a_.gated) pre[2 * i] += problem_.gate_bias[neuron], pre[2 * i + 1] += problem_.up_bias[neuron];
      if (!a_.gated) pre[i] += problem_.up_bias[neuron];
    }
  }

  void Dot(int64_t i, int64_t j, int first, int subrows, const int32_t* list, int64_t count, float* out) const {
    k_.dot[type_](Row(i), WeightAt(problem_, problem_.w_in, (j * n_ + first) * d_), d_, n_ * d_, subrows, list, count, out);
  }

  // Scores of neurons j .. j + size - 1 of a row, and what of its gates or hidden values falls out on the way.
  void ScoreBlock(int64_t i, int64_t j, int64_t size) const {
    float pre[2 * kMaxBlock], estimate[kMaxBlock];
    float* score = plan_.score + i * f_ + j;
    float* hidden = plan_.hidden + i * f_ + j;
    switch (a_.score) {
      case Score::kGate: {
        float* value = a_.gated ? plan_.gate + i * f_ + j : hidden;
        Dot(i, j, 0, 1, nullptr, size, pre);
        const float* bias = a_.has_bias ? (a_.gated ? problem_.gate_bias : problem_.up_bias) + j : nullptr;
        if (bias) k_.add(bias, size, pre);
        k_.activate(a_.activation, false, pre, size, value);
        for (int64_t k = 0; k < size; ++k) score[k] = std::fabs(value[k]);
        return;
      }
      case Score::kExact:
        Dot(i, j, 0, static_cast<int>(n_), nullptr, size, pre);
        AddBias(j, nullptr, size, pre);
        k_.activate(a_.activation, a_.gated, pre, size, hidden);
        for (int64_t k = 0; k < size; ++k) score[k] = std::fabs(hidden[k]) * problem_.neuron_scale[j + k];
        return;
      case Score::kShadow: {
        const int64_t row = j * n_, blocks = d_ / kShadowBlock;
        k_.shadow(Row(i), Folded(i), problem_.shadow + row * (d_ / 2), problem_.shadow_scale + row * blocks * 2, d_,
                  size * n_, pre);
        AddBias(j, nullptr, size, pre);
        k_.activate(a_.activation, a_.gated, pre, size, estimate);
        for (int64_t k = 0; k < size; ++k) score[k] = std::fabs(estimate[k]) * problem_.neuron_scale[j + k];
        return;
      }
      default:
        return;
    }
  }

  // The mask of the granules of neurons j .. j + size - 1; granules do not straddle blocks.
  void DecideBlock(int64_t i, int64_t j, int64_t size) const {
    const int64_t g = a_.granule, first = j / g, count = size / g, granules = problem_.granules();
    const float* score;
    if (a_.score == Score::kExternal) {
      score = External(i) + first;
    } else {
      const float* neuron = a_.score == Score::kPrefix ? plan_.prefix + Sequence(i) * f_ + j : plan_.score + i * f_ + j;
      score = neuron;
      if (g > 1) {
        // In place for computed scores: granule e is written after its neurons, and those before it, were read.
        float* sums = plan_.score + i * f_ + j;
        for (int64_t e = 0; e < count; ++e) {
          float sum = 0.0f;
          for (int64_t k = e * g; k < (e + 1) * g; ++k) sum += neuron[k];
          sums[e] = sum;
        }
        score = sums;
      }
    }
    const int64_t sequence = Sequence(i);
    Decide(problem_, first, count, score, plan_.multiplier[rows_[i]],
           plan_.prior ? plan_.prior + sequence * granules : nullptr,
           plan_.prior_factor ? plan_.prior_factor + sequence * granules : nullptr, plan_.mask + i * granules + first,
           plan_.rank ? plan_.rank + i * granules : nullptr);
  }

  // The block's share of y for a row.
  void ComputeBlock(int64_t i, int64_t j, int64_t size, float* partial, int32_t* active) const {
    float pre[2 * kMaxBlock], value[kMaxBlock];
    int32_t list[kMaxBlock];
    const bool sparse = Sparse(i);
    int64_t count = size;
    if (sparse) {
      const uint8_t* mask = plan_.mask + i * problem_.granules();
      count = 0;
      for (int64_t k = 0; k < size; ++k) {
        list[count] = static_cast<int32_t>(k);
        count += mask[a_.granule == 1 ? j + k : (j + k) / a_.granule];
      }
    }
    if (count == 0) return;
    const int32_t* chosen = sparse ? list : nullptr;
    float* stored = plan_.hidden + i * f_ + j;
    float* hidden = sparse ? value : stored;
    if (sparse && (a_.score == Score::kExact || (a_.score == Score::kGate && !a_.gated))) {
      for (int64_t k = 0; k < count; ++k) hidden[k] = stored[list[k]];
    } else if (sparse && a_.score == Score::kGate) {
      Dot(i, j, 1, 1, chosen, count, pre);
      const float* gate = plan_.gate + i * f_ + j;
      for (int64_t k = 0; k < count; ++k)
        hidden[k] = gate[list[k]] * (a_.has_bias ? pre[k] + problem_.up_bias[j + list[k]] : pre[k]);
    } else {
      Dot(i, j, 0, static_cast<int>(n_), chosen, count, pre);
      AddBias(j, chosen, count, pre);
      k_.activate(a_.activation, a_.gated, pre, count, hidden);
    }
    if (a_.combine == Combine::kWeighted) {
      // Into `value`: the statistic needs the unweighted hidden state.
      const float* weight = External(i);
      for (int64_t k = 0; k < count; ++k) value[k] = hidden[k] * weight[(j + (sparse ? list[k] : k)) / a_.granule];
      hidden = value;
    }
    if (*active == 0) std::memset(partial, 0, static_cast<size_t>(d_) * sizeof(float));
    k_.axpy[type_](hidden, WeightAt(problem_, problem_.w_out, j * d_), d_, chosen, count, partial);
    *active += static_cast<int32_t>(count);
  }

  // The chunks' shares are added in their order, so that the result does not depend on who computed them.
  void Finish(int64_t i) const {
    const int64_t row = rows_[i];
    float* y = Results(problem_) + row * d_;
    const size_t bytes = static_cast<size_t>(d_) * sizeof(float);
    a_.has_bias ? std::memcpy(y, problem_.down_bias, bytes) : std::memset(y, 0, bytes);
    int32_t active = 0;
    for (int64_t c = 0; c < plan_.chunks; ++c) {
      const int64_t at = c * plan_.block_rows + i;
      if (plan_.count[at] > 0) k_.add(plan_.partial + at * d_, d_, y);
      active += plan_.count[at];
    }
    if (problem_.active) problem_.active[row] = active;
    if (a_.emit_stat && plan_.kind[row] == kPromptRow) {
      const float* hidden = plan_.hidden + i * f_;
      const float total = a_.stat_norm == StatNorm::kRow ? Energy(hidden, f_) : 1.0f;
      AddShare(hidden, f_, total, problem_.stat + Sequence(i) * f_);
    }
  }

  const Problem& problem_;
  const Attributes& a_;
  const Kernels& k_;
  const Plan& plan_;
  const int32_t* rows_;
  const int64_t count_, d_, f_, n_;
  const int type_;
  int64_t block_ = 0;
  bool any_sparse_ = false;
};

}  // namespace

void RunDirect(const Problem& problem, const Host& host, const Plan& plan, const int32_t* rows, int64_t count) {
  Direct(problem, host, plan, rows, count).Run(host);
}

}  // namespace clada
