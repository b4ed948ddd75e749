// SPDX-License-Identifier: Apache-2.0
// The kernel of com.clada::SparseFFN on raw pointers: no framework, no allocation, no threads of its own.
//
// docs/sparse-ffn-op.md is the contract. Notation: d hidden size, f neurons, n = 2 (gate, up) or 1 (up), g granule, E = f / g.
#ifndef CLADA_SPARSE_FFN_H_
#define CLADA_SPARSE_FFN_H_

#include <cstddef>
#include <cstdint>

// Device code calls the few functions of this header too.
#ifdef __CUDACC__
#define CLADA_ANYWHERE __host__ __device__
#else
#define CLADA_ANYWHERE
#endif

namespace clada {

constexpr int kOpVersion = 1;
constexpr int kShadowBlock = 32;  // weights that share one (scale, offset) pair

enum class FloatType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
CLADA_ANYWHERE constexpr int64_t SizeOf(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }
enum class Activation { kSilu = 0, kGelu, kGeluTanh, kRelu, kRelu2, kIdentity };
enum class Score { kGate = 0, kExact, kShadow, kPrefix, kExternal };
enum class Rule { kThreshold = 0, kRelative, kTopk };
enum class Combine { kSum = 0, kWeighted };
enum class StatNorm { kRow = 0, kNone };

struct Attributes {
  Activation activation = Activation::kSilu;
  bool gated = true;
  Score score = Score::kGate;
  Rule rule = Rule::kThreshold;
  int64_t granule = 1;
  Combine combine = Combine::kSum;
  float load_slope = 0.0f;
  float load_min = 0.25f;
  float load_max = 4.0f;
  bool use_stat = false;
  float backbone_min = 0.0f;
  float prior_gamma = 0.0f;
  bool emit_stat = false;
  StatNorm stat_norm = StatNorm::kRow;
  bool emit_active = false;
  bool has_bias = false;
};

// One call. Rows are batch x sequence; a shape without batch is one batch. Inputs need no alignment beyond their element's.
struct Problem {
  Attributes attributes;
  int64_t batch = 0;
  int64_t sequence = 0;
  int64_t hidden_size = 0;        // d
  int64_t intermediate_size = 0;  // f
  FloatType weight_type = FloatType::kFloat32;  // of w_in and w_out
  FloatType x_type = FloatType::kFloat32;       // of x and y: float32, or weight_type

  const void* x = nullptr;                // [batch, sequence, d]
  const float* load = nullptr;            // [batch, sequence]
  const void* w_in = nullptr;             // [f, n, d]
  const void* w_out = nullptr;            // [f, d]
  const float* threshold = nullptr;       // [1] or [E]
  int64_t threshold_count = 1;
  const float* neuron_scale = nullptr;    // [f], scores exact and shadow
  const uint8_t* shadow = nullptr;        // [f, n, d / 2]
  const uint16_t* shadow_scale = nullptr; // float16 [f, n, d / 32, 2]
  const float* score = nullptr;           // [batch, sequence, E] or, per sequence, [batch, E]
  bool score_per_sequence = false;
  const float* past_stat = nullptr;       // [batch, f]
  const float* gate_bias = nullptr;       // [f]
  const float* up_bias = nullptr;         // [f]
  const float* down_bias = nullptr;       // [d]

  void* y = nullptr;                      // [batch, sequence, d]
  float* stat = nullptr;                  // [batch, f], with emit_stat
  int32_t* active = nullptr;              // [batch, sequence], with emit_active

  CLADA_ANYWHERE int64_t rows() const { return batch * sequence; }
  CLADA_ANYWHERE int64_t granules() const { return intermediate_size / attributes.granule; }
  CLADA_ANYWHERE int64_t projections() const { return attributes.gated ? 2 : 1; }
};

// How many of `granules` the rule topk takes: `wanted`, an integer in float32, within 1 .. granules. Above 2^24 there are counts that
// no float32 has, so they are compared in float64. What is not a number takes one.
CLADA_ANYWHERE inline int64_t TopCount(float wanted, int64_t granules) {
  if (static_cast<double>(wanted) >= static_cast<double>(granules)) return granules;
  return wanted >= 1.0f ? static_cast<int64_t>(wanted) : 1;
}

// The host's thread pool: calls body(context, i) for every i in [0, count), in any order, on any threads, and returns when
// all calls have returned. The bodies do not throw.
using ParallelBody = void (*)(void* context, size_t index);
struct ParallelFor {
  void (*run)(void* host, size_t count, ParallelBody body, void* context) = nullptr;  // null: the calling thread
  void* host = nullptr;
};

// An instruction set: "avx512", "avx2" or "baseline".
struct Kernels;
// The named one, or the best this machine has when name is null or empty. Null when it is unknown or the machine lacks it.
const Kernels* FindKernels(const char* name);
const char* KernelsName(const Kernels* kernels);

struct Host {
  ParallelFor parallel_for;
  const Kernels* kernels = nullptr;
};

// Bytes of scratch memory that a call of these sizes needs. Looks at no pointer.
size_t ScratchBytes(const Problem& problem);

// Runs one call. Shapes must have been checked (clada/contract.h). `scratch` is 64-byte aligned and holds ScratchBytes().
// A row of y has the same bits for any number of threads and any other rows; a sequence's row of stat, for any other sequences.
// Memory stays within its bounds whatever the inputs' values are, also if they change meanwhile.
void RunSparseFFN(const Problem& problem, const Host& host, void* scratch);

}  // namespace clada

#endif  // CLADA_SPARSE_FFN_H_
