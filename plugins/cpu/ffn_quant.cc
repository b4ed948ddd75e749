// SPDX-License-Identifier: Apache-2.0
#include "ffn_quant.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "ffn_quant_kernels.h"
#include "instruction_sets.h"
#include "plan.h"

namespace clada::quant {
namespace {

constexpr int64_t kFewRows = 4;     // that go through w_out one by one; more of them are products of matrices
constexpr int64_t kPassRows = 256;  // rows whose numbers are kept at a time; then the weights are read again
constexpr int64_t kMostTasks = 16;
constexpr int64_t kTaskBytes = 32 << 10;  // of weights, at least: less is not worth another thread
constexpr int64_t kPieceBytes = 192;      // of a neuron that a task reads, at least, where that leaves two: shorter reads are slower

// Rows of numbers in 8 bits, in the scratch memory.
struct Rounded {
  int8_t* q = nullptr;       // [pass_rows, width]
  float* scale = nullptr;    // [pass_rows, width / 32]
  int32_t* sum = nullptr;    // [pass_rows, width / 32]

  XRows From(int64_t row, int64_t width) const {
    const int64_t blocks = width / kBlock;
    return {q + row * width, scale + row * blocks, sum + row * blocks, blocks};
  }
};

// A pass's numbers; rows are those of the call that are no padding, one after the other.
struct FfnPlan {
  int64_t pass_rows = 0;
  bool few = false;            // the call's rows go through w_out one by one
  int32_t* order = nullptr;    // [rows] which row of the call
  uint8_t* kind = nullptr;     // [rows] RowKind, by the call's row
  float* multiplier = nullptr;  // [rows] m(load), by the call's row
  Rounded x, hidden;
  int32_t* counts = nullptr;   // [pass_rows, groups] neurons that the rule keeps
  // DownCall's, for few rows.
  uint8_t* list = nullptr;     // [pass_rows, groups, 32]
  int8_t* listed = nullptr;    // [pass_rows, groups, 32]
  uint8_t* quads = nullptr;    // [pass_rows, groups]
  uint8_t* records = nullptr;  // w_out as a weight of QuantMatMul, for many rows
  // Rules that look at a whole row.
  float* values = nullptr;     // [pass_rows, f] h
  float* score = nullptr;      // [pass_rows, f]
  uint8_t* mask = nullptr;     // [pass_rows, f]
  uint64_t* rank = nullptr;    // [pass_rows, f]
};

int FormatOf(const clada::Problem& p) {
  const int bits = FormatBits(p.attributes.weight_format);
  return static_cast<int>(std::find(std::begin(kFormatBits), std::end(kFormatBits), bits) - std::begin(kFormatBits));
}

int64_t Record(const clada::Problem& p) { return RecordBytes(FormatBits(p.attributes.weight_format), false); }

size_t MakeFfnPlan(const clada::Problem& p, void* base, FfnPlan* plan) {
  const int64_t rows = p.rows(), d = p.hidden_size, f = p.intermediate_size, groups = f / kBlock;
  const int64_t pass = plan->pass_rows = std::min(rows, kPassRows);
  plan->few = rows <= kFewRows;
  Arena arena(base);
  plan->order = arena.Take<int32_t>(rows);
  plan->kind = arena.Take<uint8_t>(rows);
  plan->multiplier = arena.Take<float>(rows);
  const auto rounded = [&](Rounded* of, int64_t width) {
    of->q = arena.Take<int8_t>(pass * width);
    of->scale = arena.Take<float>(pass * (width / kBlock));
    of->sum = arena.Take<int32_t>(pass * (width / kBlock));
  };
  rounded(&plan->x, d);
  rounded(&plan->hidden, f);
  plan->counts = arena.Take<int32_t>(pass * groups);
  if (plan->few) {
    plan->list = arena.Take<uint8_t>(pass * f);
    plan->listed = arena.Take<int8_t>(pass * f);
    plan->quads = arena.Take<uint8_t>(pass * groups);
  } else {
    plan->records = arena.Take<uint8_t>(d / kTileRows * groups * Record(p));
  }
  if (p.attributes.rule != Rule::kThreshold) {
    plan->values = arena.Take<float>(pass * f);
    plan->score = arena.Take<float>(pass * f);
    plan->mask = arena.Take<uint8_t>(pass * f);
    if (p.attributes.rule == Rule::kTopk) plan->rank = arena.Take<uint64_t>(pass * f);
  }
  return arena.most();
}

// One pass over `count` rows, from `first` on in the plan's order.
class Pass {
 public:
  Pass(const clada::Problem& problem, const Host& host, const FfnPlan& plan, int64_t first, int64_t count)
      : p_(problem),
        a_(problem.attributes),
        host_(host),
        products_(*host.set->quant_matmul),
        plan_(plan),
        first_(first),
        rows_(plan.order + first),
        count_(count),
        d_(problem.hidden_size),
        f_(problem.intermediate_size),
        groups_(problem.intermediate_size / kBlock),
        format_(FormatOf(problem)),
        record_(Record(problem)) {}

  void Run() {
    const int64_t blocks = d_ / kBlock;
    EachRow([&](int64_t i) {
      products_.quantise(Rows(p_) + rows_[i] * d_, blocks, plan_.x.q + i * d_, plan_.x.scale + i * blocks, plan_.x.sum + i * blocks);
    });
    const int64_t read = p_.projections() * groups_ * (d_ / kBlock) * record_ * CeilDiv(count_, kFewRows);
    const int64_t tasks = Tasks(groups_, read);
    Parallel(host_, tasks, [&](int64_t task) {
      for (int64_t g = groups_ * task / tasks; g < groups_ * (task + 1) / tasks; ++g) Neurons(g);
    });
    if (a_.rule != Rule::kThreshold)
      Parallel(host_, count_, [&](int64_t i) { DecideRow(i); });
    plan_.few ? FewDown() : ManyDown();
    for (int64_t i = 0; i < count_ && p_.active; ++i) {
      int32_t active = 0;
      for (int64_t g = 0; g < groups_; ++g) active += plan_.counts[i * groups_ + g];
      p_.active[rows_[i]] = active;
    }
  }

 private:
  static int64_t Tasks(int64_t most, int64_t bytes) {
    return std::min(most, std::clamp<int64_t>(bytes / kTaskBytes, 1, kMostTasks));
  }

  // A few rows are done sooner than other threads have begun.
  template <class Body>
  void EachRow(const Body& body) const {
    if (count_ > kFewRows) return Parallel(host_, count_, body);
    for (int64_t i = 0; i < count_; ++i) body(i);
  }

  bool Sparse(int64_t i) const { return plan_.kind[rows_[i]] == kSparseRow; }

  // Gate, up, h and, where the rule needs no other neuron, the choice: of a group's neurons, for all rows.
  void Neurons(int64_t g) const {
    const int64_t n = p_.projections(), tile_bytes = d_ / kBlock * record_;
    const auto* weight = static_cast<const uint8_t*>(p_.w_in) + g * n * tile_bytes;
    for (int64_t first = 0; first < count_; first += products_.run_rows) {
      const int64_t rows = std::min(products_.run_rows, count_ - first);
      alignas(64) float sums[2][kMostRunRows * kTileRows];
      for (int64_t t = 0; t < n; ++t)
        products_.tile[format_][0](weight + t * tile_bytes, plan_.x.From(first, d_), rows, sums[t]);
      for (int64_t r = 0; r < rows; ++r) {
        float hidden[kBlock];
        if (a_.gated)
          Gated(g, sums[0] + r * kTileRows, sums[1] + r * kTileRows, hidden);
        else
          Plain(g, sums[0] + r * kTileRows, hidden);
        Store(g, first + r, hidden);
      }
    }
  }

  // A tile holds the gates of 16 neurons and then their ups.
  void Gated(int64_t g, const float* low, const float* high, float* hidden) const {
    constexpr int64_t kHalf = kTileRows / 2;
    float gate[kBlock], up[kBlock];
    std::memcpy(gate, low, kHalf * sizeof(float));
    std::memcpy(gate + kHalf, high, kHalf * sizeof(float));
    std::memcpy(up, low + kHalf, kHalf * sizeof(float));
    std::memcpy(up + kHalf, high + kHalf, kHalf * sizeof(float));
    if (a_.has_bias) {
      for (int64_t j = 0; j < kBlock; ++j) gate[j] += p_.gate_bias[g * kBlock + j];
      for (int64_t j = 0; j < kBlock; ++j) up[j] += p_.up_bias[g * kBlock + j];
    }
    host_.kernels->activate(a_.activation, false, gate, kBlock, hidden);
    for (int64_t j = 0; j < kBlock; ++j) hidden[j] *= up[j];
  }

  void Plain(int64_t g, const float* sums, float* hidden) const {
    float up[kBlock];
    for (int64_t j = 0; j < kBlock; ++j) up[j] = a_.has_bias ? sums[j] + p_.up_bias[g * kBlock + j] : sums[j];
    host_.kernels->activate(a_.activation, false, up, kBlock, hidden);
  }

  void Store(int64_t g, int64_t i, float* hidden) const {
    const int64_t at = g * kBlock;
    float score[kBlock];
    if (Sparse(i))
      for (int64_t j = 0; j < kBlock; ++j) score[j] = std::fabs(hidden[j]) * p_.neuron_scale[at + j];
    if (a_.rule != Rule::kThreshold) {
      std::memcpy(plan_.values + i * f_ + at, hidden, sizeof(score));
      if (Sparse(i)) std::memcpy(plan_.score + i * f_ + at, score, sizeof(score));
      return;
    }
    uint8_t mask[kBlock];
    if (Sparse(i)) Decide(p_, at, kBlock, score, plan_.multiplier[rows_[i]], nullptr, nullptr, mask, nullptr);
    Choose(g, i, Sparse(i) ? mask : nullptr, hidden);
  }

  void DecideRow(int64_t i) const {
    const bool sparse = Sparse(i);
    uint8_t* mask = plan_.mask + i * f_;
    uint64_t* rank = plan_.rank ? plan_.rank + i * f_ : nullptr;
    if (sparse) Decide(p_, 0, f_, plan_.score + i * f_, plan_.multiplier[rows_[i]], nullptr, nullptr, mask, rank);
    for (int64_t g = 0; g < groups_; ++g)
      Choose(g, i, sparse ? mask + g * kBlock : nullptr, plan_.values + i * f_ + g * kBlock);
  }

  // Zeros in the place of what is skipped, and the group in 8 bits.
  void Choose(int64_t g, int64_t i, const uint8_t* mask, float* hidden) const {
    const int64_t at = i * groups_ + g;
    int32_t kept = kBlock;
    if (mask) {
      kept = 0;
      for (int64_t j = 0; j < kBlock; ++j) {
        hidden[j] = mask[j] ? hidden[j] : 0.0f;
        kept += mask[j];
      }
    }
    plan_.counts[at] = kept;
    int8_t* q = plan_.hidden.q + at * kBlock;
    products_.quantise(hidden, 1, q, plan_.hidden.scale + at, plan_.hidden.sum + at);
    if (!plan_.few) return;
    uint8_t* list = plan_.list + at * kBlock;
    int8_t* listed = plan_.listed + at * kBlock;
    int64_t count = 0;
    for (int64_t j = 0; j < kBlock; ++j) {
      list[count] = static_cast<uint8_t>(j);
      listed[count] = q[j];
      count += q[j] != 0;
    }
    for (; count % 4; ++count) list[count] = 0, listed[count] = 0;
    plan_.quads[at] = static_cast<uint8_t>(count / 4);
  }

  void AddBias(float* y, int64_t first, int64_t end) const {
    if (a_.has_bias)
      for (int64_t c = first; c < end; ++c) y[c] += p_.down_bias[c];
  }

  void FewDown() const {
    const int bits = kFormatBits[format_];
    const int64_t chunks = CeilDiv(d_, kChunkColumns), piece = NeuronBytes(kChunkColumns, bits);
    const int64_t most = std::max(std::min<int64_t>(2, chunks), chunks * piece / std::max(piece, kPieceBytes));
    const int64_t tasks = Tasks(most, groups_ * GroupBytes(d_, bits) * count_);
    Parallel(host_, tasks, [&](int64_t task) {
      for (int64_t i = 0; i < count_; ++i) {
        DownCall call;
        call.w_out = static_cast<const uint8_t*>(p_.w_out);
        call.columns = d_;
        call.groups = groups_;
        call.first = chunks * task / tasks * kChunkColumns;
        call.end = std::min(d_, chunks * (task + 1) / tasks * kChunkColumns);
        call.scale = plan_.hidden.scale + i * groups_;
        call.sum = plan_.hidden.sum + i * groups_;
        call.list = plan_.list + i * f_;
        call.q = plan_.listed + i * f_;
        call.quads = plan_.quads + i * groups_;
        call.y = Results(p_) + rows_[i] * d_;
        host_.set->quant_ffn->down[format_](call);
        AddBias(call.y, call.first, call.end);
      }
    });
  }

  // A task's columns become records, and then all rows go through them.
  void ManyDown() const {
    const int64_t chunks = CeilDiv(d_, kChunkColumns), tile_bytes = groups_ * record_;
    const int64_t group_bytes = GroupBytes(d_, kFormatBits[format_]);
    Parallel(host_, chunks, [&](int64_t chunk) {
      const int64_t column = chunk * kChunkColumns, end = std::min(d_, column + kChunkColumns);
      uint8_t* records = plan_.records + column / kTileRows * tile_bytes;
      const auto* w_out = static_cast<const uint8_t*>(p_.w_out);
      for (int64_t g = 0; g < groups_ && first_ == 0; ++g)  // later passes find them there
        host_.set->quant_ffn->to_records[format_](w_out + g * group_bytes, d_, column, records + g * record_, tile_bytes);
      for (int64_t at = column; at < end; at += kTileRows, records += tile_bytes)
        for (int64_t first = 0; first < count_; first += products_.run_rows) {
          const int64_t rows = std::min(products_.run_rows, count_ - first);
          alignas(64) float sums[kMostRunRows * kTileRows];
          products_.tile[format_][0](records, plan_.hidden.From(first, f_), rows, sums);
          for (int64_t r = 0; r < rows; ++r) {
            float* y = Results(p_) + rows_[first + r] * d_;
            std::memcpy(y + at, sums + r * kTileRows, kTileRows * sizeof(float));
            AddBias(y, at, at + kTileRows);
          }
        }
    });
  }

  const clada::Problem& p_;
  const clada::Attributes& a_;
  const Host& host_;
  const Kernels& products_;
  const FfnPlan& plan_;
  const int64_t first_;
  const int32_t* rows_;
  const int64_t count_, d_, f_, groups_;
  const int format_;
  const int64_t record_;
};

}  // namespace

size_t FfnScratchBytes(const clada::Problem& problem) {
  FfnPlan plan;
  return MakeFfnPlan(problem, nullptr, &plan);
}

void RunFfn(const clada::Problem& problem, const Host& host, void* scratch) {
  const int64_t rows = problem.rows(), d = problem.hidden_size;
  if (rows == 0) return;
  FfnPlan plan;
  MakeFfnPlan(problem, scratch, &plan);
  int64_t live = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float load = ReadOnce(problem.load + r);
    plan.kind[r] = KindOf(load);
    if (plan.kind[r] == kPaddingRow) {
      std::memset(Results(problem) + r * d, 0, static_cast<size_t>(d) * sizeof(float));
      if (problem.active) problem.active[r] = 0;
      continue;
    }
    plan.multiplier[r] = plan.kind[r] == kSparseRow ? LoadMultiplier(problem.attributes, load) : 1.0f;
    plan.order[live++] = static_cast<int32_t>(r);
  }
  for (int64_t done = 0; done < live; done += plan.pass_rows)
    Pass(problem, host, plan, done, std::min(plan.pass_rows, live - done)).Run();
}

}  // namespace clada::quant
