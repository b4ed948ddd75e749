// SPDX-License-Identifier: Apache-2.0
// Up to 16 rows: a block owns a range of neurons. It scores them, decides, computes the hidden values of those that any row
// needs, and adds their down rows to a partial result of its own; a second kernel adds the partial results. The order of every
// sum follows from the sizes alone, so a row gives the same bits alone and in company.
#include "arithmetic.h"
#include "block.h"
#include "dot.h"
#include "kernels.h"

namespace clada::cuda {
namespace {

constexpr int kColumns = 8;    // of w_out that a thread adds up at a time
constexpr int kRowsAtOnce = 8;  // for so many rows: more would not fit the registers

template <int kRows>
struct Rows {
  int kind[kRows];
  float multiplier[kRows];
};

// Reads the loads of rows [first, first + count); says whether one is finite. The caller synchronises.
template <int kRows>
__device__ __forceinline__ void ReadLoads(const Problem& problem, int64_t first, int64_t count, Rows<kRows>* rows) {
  const int r = threadIdx.x;
  if (r >= kRows) return;
  const float load = r < count ? problem.load[first + r] : -INFINITY;
  rows->kind[r] = KindOf(load);
  rows->multiplier[r] = rows->kind[r] == kSparseRow ? LoadMultiplier(problem.attributes, load) : 1.0f;
}

template <int kRows>
__device__ __forceinline__ bool AnySparse(const Rows<kRows>& rows) {
  bool any = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) any |= rows.kind[r] == kSparseRow;
  return any;
}

template <class W>
__device__ __forceinline__ bool Vector(const Problem& problem) {
  const int64_t step = 16 / sizeof(W);
  return problem.hidden_size % step == 0 && reinterpret_cast<uintptr_t>(problem.w_in) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(problem.w_out) % 16 == 0;
}

__device__ __forceinline__ bool ShadowAligned(const Problem& problem) {
  return reinterpret_cast<uintptr_t>(problem.shadow) % 16 == 0;  // d is a multiple of 32, so every row begins like the first
}

// The products of neuron j's rows with the lane's row of x: (gate, up), or (up, nothing).
template <class W, int kRows>
__device__ __forceinline__ Pair Multiply(const Problem& problem, int64_t j, bool vector, const float* x) {
  const int d = static_cast<int>(problem.hidden_size);
  const W* w_in = static_cast<const W*>(problem.w_in);
  if (problem.attributes.gated) return DotOfLane<W, 2, kRows>(w_in + j * 2 * d, d, vector, x);
  return DotOfLane<W, 1, kRows>(w_in + j * d, d, vector, x);
}

template <int kRows>
__device__ __forceinline__ Pair MultiplyShadow(const Problem& problem, int64_t j, const float* x, const float* x_sum) {
  const int d = static_cast<int>(problem.hidden_size);
  const int64_t n = problem.projections();
  const uint8_t* shadow = problem.shadow + j * n * (d / 2);
  const uint16_t* scale = problem.shadow_scale + j * n * (d / kShadowBlock) * 2;
  const bool aligned = ShadowAligned(problem);
  if (n == 2) return ShadowDotOfLane<2, kRows>(shadow, scale, d, aligned, x, x_sum);
  return ShadowDotOfLane<1, kRows>(shadow, scale, d, aligned, x, x_sum);
}

struct RowInputs {
  const float* x;
  const float* shadow_x;
  const float* shadow_sum;
};

// A neuron's score for the lane's row, and what it brings along: the gate (score `gate`) or the hidden value (`exact`).
struct Scored {
  float score;
  float known;
};

// One warp, all lanes; `row` is the lane's. Not for score `external`.
template <class W, int kRows>
__device__ __forceinline__ Scored ScoreNeuron(const Problem& problem, int64_t j, int64_t row, const RowInputs& in) {
  switch (problem.attributes.score) {
    case Score::kGate: {
      const W* weights = static_cast<const W*>(problem.w_in) + j * problem.projections() * problem.hidden_size;
      const Pair product = DotOfLane<W, 1, kRows>(weights, static_cast<int>(problem.hidden_size), Vector<W>(problem), in.x);
      const float gate = Gate(problem, j, product.value[0]);
      return {fabsf(gate), gate};
    }
    case Score::kExact: {
      const Pair product = Multiply<W, kRows>(problem, j, Vector<W>(problem), in.x);
      const float hidden = Hidden(problem, j, product.value);
      return {fabsf(hidden) * problem.neuron_scale[j], hidden};
    }
    case Score::kShadow: {
      const Pair product = MultiplyShadow<kRows>(problem, j, in.shadow_x, in.shadow_sum);
      return {fabsf(Hidden(problem, j, product.value)) * problem.neuron_scale[j], 0.0f};
    }
    default:
      return {problem.attributes.score == Score::kPrefix && row < problem.rows() ? PrefixScore(problem, row, j) : 0.0f, 0.0f};
  }
}

__device__ __forceinline__ bool Knows(const Attributes& a) { return a.score == Score::kGate || a.score == Score::kExact; }

// score [.., f] and known [.., f] of rows first + blockIdx.y * kRows ..., of the neurons of this block.
template <class W, int kRows>
__global__ void __launch_bounds__(kThreads)
    ScoresKernel(Problem problem, int64_t first, int64_t count, int range, RowInputs in, float* score_out, float* known_out) {
  __shared__ Rows<kRows> rows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t at = static_cast<int64_t>(blockIdx.y) * kRows, f = problem.intermediate_size, d = problem.hidden_size;
  ReadLoads(problem, first + at, count - at, &rows);
  __syncthreads();
  if (!AnySparse(rows)) return;
  RowInputs here = in;
  if (here.x) here.x += at * RoundUp(d, kWarpWeights);
  if (here.shadow_x) {
    here.shadow_x += at * RoundUp(d, kShadowWeights);
    here.shadow_sum += at * RoundUp(d, kShadowWeights) / kShadowBlock;
  }
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * range;
  for (int64_t j = begin + warp; j < begin + range && j < f; j += kWarps) {
    const Scored scored = ScoreNeuron<W, kRows>(problem, j, first + at + lane, here);
    if (lane < kRows && at + lane < count) {
      score_out[(at + lane) * f + j] = scored.score;
      if (known_out) known_out[(at + lane) * f + j] = scored.known;
    }
  }
}

// Up to eight neighbouring elements of a row of w_out, from `column`; 0 beyond the row's end.
template <class W>
__device__ __forceinline__ void LoadColumns(const W* row, int column, int d, bool vector, float (&w)[kColumns]) {
  if (vector && column + kColumns <= d) {
    if constexpr (IsWide<W>::value) {
#pragma unroll
      for (int i = 0; i < kColumns; i += 4) {
        const uint4 raw = LoadOnce(row + column + i);
        w[i] = BitsToFloat(raw.x), w[i + 1] = BitsToFloat(raw.y), w[i + 2] = BitsToFloat(raw.z), w[i + 3] = BitsToFloat(raw.w);
      }
    } else {
      Unpack(LoadOnce(row + column), row, w);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) w[i] = column + i < d ? ToFloat(row[column + i]) : 0.0f;
}

template <class W, int kRows>
__global__ void __launch_bounds__(kThreads) SparseFFNKernel(Problem problem, DecodePlan plan) {
  __shared__ Rows<kRows> rows;
  __shared__ float score[kRows][kMaxRange];   // of neurons
  __shared__ float known[kRows][kMaxRange];   // gates or hidden values, from the scores
  __shared__ float hidden[kRows][kMaxRange];  // of the listed neurons
  __shared__ unsigned chosen[kMaxRange];      // by neuron: a bit for each row that needs it
  __shared__ int list[kMaxRange];             // the neurons that some row needs
  __shared__ unsigned listed;                 // a bit for each neuron of the range
  __shared__ float sums[kThreads * kColumns];

  const Attributes& a = problem.attributes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int count = static_cast<int>(problem.rows()), d = static_cast<int>(problem.hidden_size);
  const int64_t f = problem.intermediate_size, granules = problem.granules();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * plan.range;
  const int size = static_cast<int>(f - begin < plan.range ? f - begin : plan.range);
  const bool local = IsLocal(a), vector = Vector<W>(problem);
  const RowInputs in{plan.x, plan.shadow_x, plan.shadow_sum};

  ReadLoads<kRows>(problem, 0, count, &rows);
  __syncthreads();
  const bool any_sparse = AnySparse(rows), knows = any_sparse && Knows(a);
  if (any_sparse && local && a.score != Score::kExternal) {
    for (int i = warp; i < size; i += kWarps) {
      const Scored scored = ScoreNeuron<W, kRows>(problem, begin + i, lane, in);
      if (lane < kRows) score[lane][i] = scored.score, known[lane][i] = scored.known;
    }
  } else if (knows && !local) {
    for (int at = threadIdx.x; at < count * size; at += kThreads)
      known[at / size][at % size] = plan.known[at / size * f + begin + at % size];
  }
  __syncthreads();

  if (warp == 0) {
    const bool mine = lane < size;
    const int granule = static_cast<int>(a.granule);
    const int64_t e = (begin + (mine ? lane : 0)) / granule;
    unsigned bits = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      bool active = mine && rows.kind[r] == kDenseRow;
      if (mine && rows.kind[r] == kSparseRow) {
        if (local) {
          const RuleInput rule = MakeRuleInput(problem, plan.prior, r);
          float sum = 0.0f;
          if (a.score == Score::kExternal)
            sum = External(problem, r, e);
          else
            for (int k = 0; k < granule; ++k) sum += score[r][lane / granule * granule + k];
          // The negated comparison keeps NaN scores.
          active = !(sum < Level(rule, e, rows.multiplier[r])) && Eligible(a, rule, e);
        } else {
          active = plan.mask[r * granules + e] != 0;
        }
      }
      bits |= static_cast<unsigned>(active) << r;
      const unsigned word = Ballot(active);
      if (lane == 0 && r < count) plan.count[static_cast<int64_t>(blockIdx.x) * count + r] = CountBits(word);
    }
    const unsigned word = Ballot(bits != 0);
    if (mine) chosen[lane] = bits;
    if (bits != 0) list[CountBits(word & ((1u << lane) - 1u))] = lane;
    if (lane == 0) listed = word;
  }
  __syncthreads();

  const int active_count = CountBits(listed);
  for (int slot = warp; slot < active_count; slot += kWarps) {
    const int i = list[slot];
    const int64_t j = begin + i;
    const int r = lane < kRows ? lane : 0;
    float value = 0.0f;
    if (knows && (a.score == Score::kExact || !a.gated)) {
      value = known[r][i];
    } else if (knows) {
      const W* up = static_cast<const W*>(problem.w_in) + (j * 2 + 1) * d;
      value = known[r][i] * (DotOfLane<W, 1, kRows>(up, d, vector, in.x).value[0] + (a.has_bias ? problem.up_bias[j] : 0.0f));
    } else {
      value = Hidden(problem, j, Multiply<W, kRows>(problem, j, vector, in.x).value);
    }
    if (lane < kRows) {
      if (plan.hidden && r < count) plan.hidden[r * f + j] = value;
      const float weight = a.combine == Combine::kWeighted && r < count ? External(problem, r, j / a.granule) : 1.0f;
      // Removed, not multiplied by zero: an infinite hidden value of a neuron that is off vanishes too.
      hidden[r][slot] = chosen[i] >> r & 1u ? value * weight : 0.0f;
    }
  }
  __syncthreads();

  // Narrow rows leave threads over: they form groups, each for a part of the range. A part's slots are neighbours in the list.
  const int pieces = (d + kColumns - 1) / kColumns;
  const int groups = pieces >= kThreads ? 1 : min(kThreads / pieces, size);
  const int group = groups == 1 ? 0 : static_cast<int>(threadIdx.x) / pieces;
  const int part = (size + groups - 1) / groups;
  const auto slots_before = [&](int i) { return i >= 32 ? active_count : CountBits(listed & ((1u << i) - 1u)); };
  const int slot_begin = group < groups ? slots_before(min(group * part, size)) : 0;
  const int slot_end = group < groups ? slots_before(min((group + 1) * part, size)) : 0;
  const int piece_begin = groups == 1 ? threadIdx.x : threadIdx.x % pieces, piece_step = groups == 1 ? kThreads : pieces;
  const W* w_out = static_cast<const W*>(problem.w_out) + begin * d;
  float* partial = plan.partial + static_cast<int64_t>(blockIdx.x) * count * d;
  constexpr int kAtOnce = kRows < kRowsAtOnce ? kRows : kRowsAtOnce;
#pragma unroll 1
  for (int row = 0; row < kRows && row < count; row += kAtOnce)
    for (int piece = piece_begin; piece < pieces; piece += piece_step) {
      const int column = piece * kColumns;
      float sum[kAtOnce][kColumns];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum[r][c] = 0.0f;
#pragma unroll 4
      for (int slot = slot_begin; slot < slot_end; ++slot) {
        float w[kColumns];
        LoadColumns<W>(w_out + static_cast<int64_t>(list[slot]) * d, column, d, vector, w);
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          const float h = hidden[row + r][slot];
          // A row that does not need the neuron is left alone, also where a weight is not finite. One row needs all that are listed.
          if (kRows > 1 && h == 0.0f) continue;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) sum[r][c] += h * w[c];
        }
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (row + r >= count) break;
        float* out = partial + static_cast<int64_t>(row + r) * d + column;
        if (groups == 1) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            if (column + c < d) out[c] = sum[r][c];
          continue;
        }
        // Every thread comes here once a row: with groups, no thread has more than one piece.
        __syncthreads();
        if (group < groups)
#pragma unroll
          for (int c = 0; c < kColumns; ++c) sums[threadIdx.x * kColumns + c] = sum[r][c];
        __syncthreads();
        if (group != 0) continue;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          float total = sums[threadIdx.x * kColumns + c];
          for (int g = 1; g < groups; ++g) total += sums[(g * pieces + threadIdx.x) * kColumns + c];
          if (column + c < d) out[c] = total;
        }
      }
    }
}

__device__ __forceinline__ int CountOfThread(const DecodePlan& plan, int64_t rows, int64_t row) {
  int count = 0;
  for (int64_t b = threadIdx.x; b < plan.blocks; b += kThreads) count += plan.count[b * rows + row];
  return count;
}

// y[r] = the partial results in the order of their blocks, in eight parts, and the bias. A block has 32 columns of one row.
template <class X>
__global__ void __launch_bounds__(kThreads) ReduceKernel(Problem problem, DecodePlan plan) {
  __shared__ float sums[kWarps][32];
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t row = blockIdx.y, rows = problem.rows(), d = problem.hidden_size, column = blockIdx.x * 32ll + lane;
  const int64_t begin = part * plan.blocks / kWarps, end = (part + 1) * plan.blocks / kWarps;
  float sum = 0.0f;
  if (column < d) {
    const float* partial = plan.partial + row * d + column;
#pragma unroll 8
    for (int64_t b = begin; b < end; ++b) sum += partial[b * rows * d];
  }
  sums[part][lane] = sum;
  __syncthreads();
  const bool padding = KindOf(problem.load[row]) == kPaddingRow;
  if (part == 0 && column < d) {
    float total = sums[0][lane];
    for (int p = 1; p < kWarps; ++p) total += sums[p][lane];
    if (problem.attributes.has_bias) total += problem.down_bias[column];
    static_cast<X*>(problem.y)[row * d + column] = FromFloat<X>(padding ? 0.0f : total);
  }
  if (problem.active && blockIdx.x == 0) {
    const int active = BlockSum(CountOfThread(plan, rows, row));
    if (threadIdx.x == 0) problem.active[row] = active;
  }
}

template <int kRows>
struct RowCount {
  static constexpr int value = kRows;
};

template <class Body>
cudaError_t WithRows(int64_t group, const Body& body) {
  switch (group) {
    case 1: return body(RowCount<1>());
    case 4: return body(RowCount<4>());
    default: return body(RowCount<16>());
  }
}

}  // namespace

cudaError_t LaunchScores(const Problem& problem, const DecodePlan& plan, cudaStream_t stream) {
  const RowInputs in{plan.x, plan.shadow_x, plan.shadow_sum};
  return WithType(problem.weight_type, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    return WithRows(plan.group, [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
      return Launch(&ScoresKernel<W, kRows>, Blocks(plan.blocks), dim3(kThreads), stream, problem, int64_t{0}, problem.rows(),
                    static_cast<int>(plan.range), in, plan.score, plan.known);
    });
  });
}

cudaError_t LaunchShadowScores(const Problem& problem, const PromptPlan& plan, int64_t first, int64_t rows, cudaStream_t stream) {
  const RowInputs in{nullptr, plan.shadow_x, plan.shadow_sum};
  constexpr int kRange = 32;
  const dim3 grid = Blocks(CeilDiv(problem.intermediate_size, kRange), CeilDiv(rows, kDecodeRows));
  // The weights' type plays no part in this score.
  return Launch(&ScoresKernel<float, kDecodeRows>, grid, dim3(kThreads), stream, problem, first, rows, kRange, in, plan.score,
                static_cast<float*>(nullptr));
}

cudaError_t LaunchSparseFFN(const Problem& problem, const DecodePlan& plan, cudaStream_t stream) {
  return WithType(problem.weight_type, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    return WithRows(plan.group, [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
      return Launch(&SparseFFNKernel<W, kRows>, Blocks(plan.blocks), dim3(kThreads), stream, problem, plan);
    });
  });
}

cudaError_t LaunchReduce(const Problem& problem, const DecodePlan& plan, cudaStream_t stream) {
  return WithType(problem.x_type, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    return Launch(&ReduceKernel<X>, Blocks(CeilDiv(problem.hidden_size, 32), problem.rows()), dim3(kThreads), stream, problem, plan);
  });
}

}  // namespace clada::cuda
