// SPDX-License-Identifier: Apache-2.0
// Up to 16 rows: a block owns a range of neurons. It scores them, decides, and computes the hidden values of those that any row
// needs. For one row it goes on and adds their down rows to partial results, which another kernel adds up. For several rows those
// would be many bytes, so a kernel between adds up the down rows by columns. The order of every sum follows from the sizes alone
// (DecodePlan), so a row gives the same bits alone and in company.
#include "arithmetic.h"
#include "block.h"
#include "dot.h"
#include "kernels.h"

namespace clada::cuda {
namespace {

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
  __shared__ float hidden[kMaxRange];         // of the listed neurons, one row
  __shared__ unsigned chosen[kMaxRange];      // by neuron: a bit for each row that needs it
  __shared__ int list[kMaxRange];             // the neurons that some row needs
  __shared__ unsigned listed;                 // a bit for each neuron of the range

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
    if (mine) {
      chosen[lane] = bits;
      if (kRows > 1) plan.chosen[begin + lane] = bits != 0;
    }
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
      const float contribution = chosen[i] >> r & 1u ? value * weight : 0.0f;
      if (kRows == 1)
        hidden[slot] = contribution;
      else
        plan.contribution[r * f + j] = contribution;
    }
  }
  if (kRows > 1) return;
  __syncthreads();

  // A cell's slots are neighbours in the list.
  const int pieces = (d + kColumns - 1) / kColumns, groups = static_cast<int>(plan.groups), cell = static_cast<int>(plan.cell);
  const int group = groups == 1 ? 0 : static_cast<int>(threadIdx.x) / pieces;
  if (group >= groups) return;
  const auto slots_before = [&](int i) { return i >= size ? active_count : CountBits(listed & ((1u << i) - 1u)); };
  const int slot_begin = slots_before(group * cell), slot_end = slots_before((group + 1) * cell);
  const W* w_out = static_cast<const W*>(problem.w_out) + begin * d;
  float* partial = plan.partial + (static_cast<int64_t>(blockIdx.x) * groups + group) * d;
  for (int piece = threadIdx.x - group * pieces; piece < pieces; piece += groups == 1 ? kThreads : pieces) {
    const int column = piece * kColumns;
    float sum[kColumns] = {};
#pragma unroll 4
    for (int slot = slot_begin; slot < slot_end; ++slot) {
      float w[kColumns];
      LoadColumns<W>(w_out + static_cast<int64_t>(list[slot]) * d, column, d, vector, w);
      const float h = hidden[slot];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[c] += h * w[c];
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (column + c < d) partial[column + c] = sum[c];
  }
}

constexpr int kRowsAtOnce = 8;  // more would not fit the registers

// Several rows: a warp adds up one part for 256 columns and up to eight rows.
template <class W, int kRows>
__global__ void __launch_bounds__(kThreads) DownKernel(Problem problem, DecodePlan plan) {
  constexpr int kAtOnce = kRows < kRowsAtOnce ? kRows : kRowsAtOnce;
  const int lane = threadIdx.x % 32, d = static_cast<int>(problem.hidden_size), count = static_cast<int>(problem.rows());
  const int column = (static_cast<int>(blockIdx.x) * static_cast<int>(blockDim.x) / 32 + static_cast<int>(threadIdx.x) / 32) * 256 +
                     lane * kColumns;
  const int first_row = static_cast<int>(blockIdx.z) * kAtOnce;
  const int64_t f = problem.intermediate_size, part = blockIdx.y;
  const bool vector = Vector<W>(problem);
  const W* w_out = static_cast<const W*>(problem.w_out);
  const float* contribution = plan.contribution + first_row * f;
  float total[kAtOnce][kColumns] = {};
  bool first = true;
#pragma unroll 1
  for (int64_t at = part * plan.cells() / plan.parts; at < (part + 1) * plan.cells() / plan.parts; ++at) {
    const int64_t block = at / plan.groups, group = at % plan.groups;
    const int64_t begin = block * plan.range + group * plan.cell;
    int64_t end = group == plan.groups - 1 ? (block + 1) * plan.range : begin + plan.cell;
    if (end > (block + 1) * plan.range) end = (block + 1) * plan.range;
    if (end > f) end = f;
    const int64_t mine = begin + lane;
    unsigned chosen = Ballot(mine < end && plan.chosen[mine < end ? mine : 0] != 0);
    float sum[kAtOnce][kColumns] = {};
#pragma unroll kRows <= 4 ? 8 : 4
    for (int left = CountBits(chosen); left > 0; --left) {
      const int64_t j = begin + LowestBit(chosen);
      chosen &= chosen - 1u;
      float w[kColumns];
      LoadColumns<W>(w_out + j * d, column, d, vector, w);
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const float h = contribution[r * f + j];
        // A row that does not need the neuron is left alone, also where a weight is not finite.
        if (h == 0.0f) continue;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum[r][c] += h * w[c];
      }
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) total[r][c] = first ? sum[r][c] : total[r][c] + sum[r][c];
    first = false;
  }
#pragma unroll
  for (int r = 0; r < kAtOnce; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (first_row + r < count && column + c < d) plan.partial[(part * count + first_row + r) * d + column + c] = total[r][c];
}

__device__ __forceinline__ int CountOfThread(const DecodePlan& plan, int64_t rows, int64_t row) {
  int count = 0;
  for (int64_t b = threadIdx.x; b < plan.blocks; b += 32 * kReduceWarps) count += plan.count[b * rows + row];
  return count;
}

// y[r] = the parts in their order, and the bias. A block has 32 columns of one row.
template <class X>
__global__ void __launch_bounds__(32 * kReduceWarps) ReduceKernel(Problem problem, DecodePlan plan) {
  __shared__ float sums[kMaxParts][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = blockIdx.y, rows = problem.rows(), d = problem.hidden_size, column = blockIdx.x * 32ll + lane;
  const bool by_cell = plan.group == 1;
  for (int64_t part = warp; part < plan.parts; part += kReduceWarps) {
    float sum = 0.0f;
    if (column < d) {
      const int64_t begin = by_cell ? part * plan.cells() / plan.parts : part;
      const int64_t end = by_cell ? (part + 1) * plan.cells() / plan.parts : part + 1;
      const float* partial = plan.partial + row * d + column;
      sum = partial[begin * rows * d];
#pragma unroll 8
      for (int64_t at = begin + 1; at < end; ++at) sum += partial[at * rows * d];
    }
    sums[part][lane] = sum;
  }
  __syncthreads();
  const bool padding = KindOf(problem.load[row]) == kPaddingRow;
  if (warp == 0 && column < d) {
    float total = sums[0][lane];
    for (int p = 1; p < plan.parts; ++p) total += sums[p][lane];
    if (problem.attributes.has_bias) total += problem.down_bias[column];
    static_cast<X*>(problem.y)[row * d + column] = FromFloat<X>(padding ? 0.0f : total);
  }
  if (problem.active && blockIdx.x == 0) {
    const int active = BlockSum<kReduceWarps>(CountOfThread(plan, rows, row));
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
      const cudaError_t status = Launch(&SparseFFNKernel<W, kRows>, Blocks(plan.blocks), dim3(kThreads), stream, problem, plan);
      if constexpr (kRows == 1) {
        return status;
      } else {
        if (status != cudaSuccess) return status;
        const int64_t warps = CeilDiv(problem.hidden_size, 32 * kColumns), warps_a_block = std::min<int64_t>(warps, kWarps);
        const dim3 grid(static_cast<unsigned>(CeilDiv(warps, warps_a_block)), static_cast<unsigned>(plan.parts),
                        static_cast<unsigned>(CeilDiv(problem.rows(), kRowsAtOnce)));
        return Launch(&DownKernel<W, kRows>, grid, dim3(static_cast<unsigned>(32 * warps_a_block)), stream, problem, plan);
      }
    });
  });
}

cudaError_t LaunchReduce(const Problem& problem, const DecodePlan& plan, cudaStream_t stream) {
  return WithType(problem.x_type, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    return Launch(&ReduceKernel<X>, Blocks(CeilDiv(problem.hidden_size, 32), problem.rows()), dim3(32 * kReduceWarps), stream,
                  problem, plan);
  });
}

}  // namespace clada::cuda
