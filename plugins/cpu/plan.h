// SPDX-License-Identifier: Apache-2.0
// How one call is cut up, and where its scratch memory lies. Nothing here depends on the number of threads.
#ifndef CLADA_CPU_PLAN_H_
#define CLADA_CPU_PLAN_H_

#include "clada/sparse_ffn.h"
#include "kernels.h"

namespace clada {

constexpr int64_t kBlockNeurons = 64;     // neurons that are scored, chosen and computed together
constexpr int64_t kBlockRows = 16;        // rows that share one pass over the weights
constexpr int64_t kPromptRows = 6;        // dense rows from which products of matrices beat row by row: measured, at six by a sixth
constexpr size_t kPromptBytes = 64u << 20;  // scratch of a prompt, about
constexpr size_t kBlockBytes = 384u << 10;  // weights of one block: they stay in a core's L2 cache while rows take turns

constexpr int64_t CeilDiv(int64_t value, int64_t step) { return (value + step - 1) / step; }
constexpr int64_t RoundUp(int64_t value, int64_t step) { return CeilDiv(value, step) * step; }

// Hands out pieces of the scratch memory; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* Take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    most_ = used_ > most_ ? used_ : most_;
    return piece;
  }
  size_t used() const { return used_; }
  // Gives back what was taken since `used` was this.
  void Rewind(size_t used) { used_ = used; }
  size_t most() const { return most_; }

 private:
  char* base_;
  size_t used_ = 0, most_ = 0;
};

// What a row's load says: a rule, every neuron (+inf: a row of the prompt; NaN: one that the statistic ignores), nothing.
enum RowKind : uint8_t { kSparseRow = 0, kDenseRow = 1, kPromptRow = 2, kPaddingRow = 3 };
RowKind KindOf(float load);

// Memory that others may write meanwhile: the compiler must not read it again.
inline float ReadOnce(const float* p) { return *static_cast<const volatile float*>(p); }

// Follows from the call's sizes alone. What depends on loads is kept in the scratch memory and read from there, so that a load that
// changes while the call runs can't make two of its parts disagree.
struct Plan {
  int64_t chunk = 0;        // neurons of one task
  int64_t chunks = 0;
  bool two_pass = false;    // the rule needs all scores, or a granule is wider than a block
  int64_t block_rows = 0;   // rows of one direct pass
  int64_t panel_rows = 0;   // rows of one pass of a prompt; 0: no call of this size is one
  int64_t slots = 0;        // panels of packed weights that are in use at a time

  // Scratch.
  uint8_t* kind = nullptr;     // [rows] RowKind
  float* multiplier = nullptr;  // [rows] m(load) of sparse rows
  int32_t* order = nullptr;    // [rows] direct rows, then the prompt's
  float* prior = nullptr;      // [batch, E], with use_stat
  float* prior_factor = nullptr;  // [batch, E], with use_stat and prior_gamma > 0
  float* prefix = nullptr;     // [batch, f], score prefix

  // Of a direct pass.
  float* folded = nullptr;     // [block_rows, d / 16], score shadow
  float* score = nullptr;      // [block_rows, f] of neurons; of granules after the decision's sum
  float* hidden = nullptr;     // [block_rows, f]
  float* gate = nullptr;       // [block_rows, f] activated gates, score gate
  uint8_t* mask = nullptr;     // [block_rows, E], two passes
  uint64_t* rank = nullptr;    // [block_rows, E], rule topk
  float* partial = nullptr;    // [chunks, block_rows, d]
  int32_t* count = nullptr;    // [chunks, block_rows] active neurons

  // Of a prompt's pass, in the same memory.
  float* x = nullptr;          // [panel_rows, PackedSize(d)] packed
  float* hidden_rows = nullptr;  // [panel_rows, f]
  float* weights = nullptr;    // [slots, kPanelColumns, PackedSize(d)] packed weights
  float* bias = nullptr;       // [f, n], the biases as w_in orders them
  float* energy = nullptr;     // [panel_rows] what a row's h^2 is divided by; 0: the row is not counted
};

// x and y inside the kernels, where they are float32 (RunSparseFFN widens 16-bit rows first).
inline const float* Rows(const Problem& problem) { return static_cast<const float*>(problem.x); }
inline float* Results(const Problem& problem) { return static_cast<float*>(problem.y); }

// Rounds to nearest, ties to even: count float32 values to float16 or bfloat16.
void Narrow(FloatType type, const float* source, int64_t count, uint16_t* target);

// Fills a plan; `base` null: only the size counts. Returns the bytes of scratch memory.
size_t MakePlan(const Problem& problem, void* base, Plan* plan);

// select.cc: the rule, for one row with a finite load.
float LoadMultiplier(const Attributes& attributes, float load);
// mask[e] = 1 iff granule e of the row runs. `rank` is scratch of E numbers, for topk.
void Decide(const Problem& problem, int64_t first, int64_t count, const float* score, float multiplier, const float* prior,
            const float* prior_factor, uint8_t* mask, uint64_t* rank);

// direct.cc: `count` rows (their indices in `rows`, ascending), neuron by neuron.
void RunDirect(const Problem& problem, const Host& host, const Plan& plan, const int32_t* rows, int64_t count);

// prompt.cc: `count` dense rows (their indices in `rows`, ascending), together.
void RunPrompt(const Problem& problem, const Host& host, const Plan& plan, const int32_t* rows, int64_t count);

// The sum of hidden^2.
float Energy(const float* hidden, int64_t count);
// stat += hidden^2 / total; nothing if total is 0. With stat_norm `none` total is 1.
void AddShare(const float* hidden, int64_t count, float total, float* stat);

// Runs body(i) for i in [0, count) on the host's threads.
template <class Body>
void Parallel(const Host& host, int64_t count, const Body& body) {
  if (count <= 0) return;
  if (count == 1 || host.parallel_for.run == nullptr) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  host.parallel_for.run(
      host.parallel_for.host, static_cast<size_t>(count),
      [](void* context, size_t i) { (*static_cast<const Body*>(context))(static_cast<int64_t>(i)); },
      const_cast<Body*>(&body));
}

inline const char* WeightAt(const Problem& problem, const void* weights, int64_t element) {
  return static_cast<const char*>(weights) + element * SizeOf(problem.weight_type);
}

}  // namespace clada

#endif  // CLADA_CPU_PLAN_H_
