// SPDX-License-Identifier: Apache-2.0
// What happens to whole rows before and after the products: x laid out, the prompt's prior, the statistic, the result's type.
#include "arithmetic.h"
#include "block.h"
#include "dot.h"
#include "kernels.h"

namespace clada::cuda {
namespace {

template <class X>
__global__ void SpreadXKernel(const X* x, int64_t d, int64_t rows, bool wide, float* out) {
  const int64_t stride = RoundUp(d, kWarpWeights), row = blockIdx.y;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= stride) return;
  out[row * stride + XIndex(i, wide)] = row < rows && i < d ? ToFloat(x[row * d + i]) : 0.0f;
}

// A thread lays out one block of 32 and adds it up.
template <class X>
__global__ void SpreadShadowXKernel(const X* x, int64_t d, int64_t rows, float* out, float* sums) {
  const int64_t stride = RoundUp(d, kShadowWeights), row = blockIdx.y;
  const int64_t block = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (block >= stride / kShadowBlock) return;
  float sum = 0.0f;
  for (int64_t i = block * kShadowBlock; i < (block + 1) * kShadowBlock; ++i) {
    const float value = row < rows && i < d ? ToFloat(x[row * d + i]) : 0.0f;
    out[row * stride + ShadowIndex(i)] = value;
    sum += value;
  }
  sums[row * (stride / kShadowBlock) + block] = sum;
}

template <class X, class W>
__global__ void ConvertXKernel(const X* x, int64_t count, W* out) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < count) out[i] = FromFloat<W>(ToFloat(x[i]));
}

// One block a sequence.
__global__ void __launch_bounds__(kThreads) PriorKernel(Problem problem, Prior prior) {
  const Attributes& a = problem.attributes;
  const int64_t f = problem.intermediate_size, granules = problem.granules(), b = blockIdx.x;
  const float* stat = problem.past_stat + b * f;
  float sum = 0.0f;
  for (int64_t j = threadIdx.x; j < f; j += kThreads) sum += sqrtf(stat[j]);
  const float mean = BlockSum(sum) / static_cast<float>(f);
  for (int64_t e = threadIdx.x; e < granules; e += kThreads) {
    float ratio = 0.0f;
    for (int64_t j = e * a.granule; j < (e + 1) * a.granule; ++j) ratio += mean > 0.0f ? sqrtf(stat[j]) / mean : 1.0f;
    ratio /= static_cast<float>(a.granule);
    prior.ratio[b * granules + e] = ratio;
    if (prior.factor) prior.factor[b * granules + e] = powf(ratio, -a.prior_gamma);
  }
}

__global__ void StartStatKernel(const float* past, int64_t count, float* stat) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < count) stat[i] = past ? past[i] : 0.0f;
}

// One block a row.
__global__ void __launch_bounds__(kThreads) EnergyKernel(Problem problem, int64_t first, const float* hidden, float* energy) {
  const int64_t f = problem.intermediate_size, row = blockIdx.x;
  const bool prompt = problem.load[first + row] == INFINITY;
  if (problem.attributes.stat_norm == StatNorm::kNone) {
    if (threadIdx.x == 0) energy[row] = prompt ? 1.0f : 0.0f;
    return;
  }
  float sum = 0.0f;
  if (prompt)
    for (int64_t j = threadIdx.x; j < f; j += kThreads) sum += hidden[row * f + j] * hidden[row * f + j];
  const float total = BlockSum(sum);
  if (threadIdx.x == 0) energy[row] = total;
}

// A thread adds up one neuron of one sequence, over its rows among [first, first + rows). The hidden values are given, or made
// from the products `pre` [rows, f, n].
__global__ void AddStatKernel(Problem problem, int64_t first, int64_t rows, const float* hidden, const float* pre,
                              const float* energy) {
  const int64_t f = problem.intermediate_size, n = problem.projections(), b = blockIdx.y;
  const int64_t j = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (j >= f) return;
  const int64_t begin = b * problem.sequence > first ? b * problem.sequence : first;
  const int64_t end = (b + 1) * problem.sequence < first + rows ? (b + 1) * problem.sequence : first + rows;
  float sum = problem.stat[b * f + j];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row - first;
    if (problem.load[row] != INFINITY || !(energy[i] > 0.0f)) continue;
    const float h = hidden ? hidden[i * f + j] : Hidden(problem, j, pre + (i * f + j) * n);
    sum += h * h / energy[i];
  }
  problem.stat[b * f + j] = sum;
}

template <class X>
__global__ void FinishKernel(Problem problem, int64_t first, const float* out) {
  const int64_t row = blockIdx.y, d = problem.hidden_size;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= d) return;
  float value = out[row * d + i];
  if (problem.attributes.has_bias) value += problem.down_bias[i];
  if (KindOf(problem.load[first + row]) == kPaddingRow) value = 0.0f;
  static_cast<X*>(problem.y)[(first + row) * d + i] = FromFloat<X>(value);
}

template <class T>
const T* RowsFrom(const Problem& problem, int64_t first) {
  return static_cast<const T*>(problem.x) + first * problem.hidden_size;
}

dim3 Elements(int64_t count, int64_t rows = 1) { return Blocks(CeilDiv(count, kThreads), rows); }

}  // namespace

cudaError_t LaunchSpreadX(const Problem& problem, int64_t first, int64_t rows, int64_t padded, float* x, cudaStream_t stream) {
  return WithType(problem.x_type, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    return Launch(&SpreadXKernel<X>, Elements(RoundUp(problem.hidden_size, kWarpWeights), padded), dim3(kThreads), stream,
                  RowsFrom<X>(problem, first), problem.hidden_size, rows, problem.weight_type == FloatType::kFloat32, x);
  });
}

cudaError_t LaunchSpreadShadowX(const Problem& problem, int64_t first, int64_t rows, int64_t padded, float* x, float* sum,
                                cudaStream_t stream) {
  return WithType(problem.x_type, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    return Launch(&SpreadShadowXKernel<X>, Elements(RoundUp(problem.hidden_size, kShadowWeights) / kShadowBlock, padded),
                  dim3(kThreads), stream, RowsFrom<X>(problem, first), problem.hidden_size, rows, x, sum);
  });
}

cudaError_t LaunchConvertX(const Problem& problem, int64_t first, int64_t rows, void* x, cudaStream_t stream) {
  const int64_t count = rows * problem.hidden_size;
  return WithType(problem.x_type, [&](auto* from) {
    using X = std::remove_pointer_t<decltype(from)>;
    return WithType(problem.weight_type, [&](auto* to) {
      using W = std::remove_pointer_t<decltype(to)>;
      return Launch(&ConvertXKernel<X, W>, Elements(count), dim3(kThreads), stream, RowsFrom<X>(problem, first), count,
                    static_cast<W*>(x));
    });
  });
}

cudaError_t LaunchPrior(const Problem& problem, const Prior& prior, cudaStream_t stream) {
  return Launch(&PriorKernel, Blocks(problem.batch), dim3(kThreads), stream, problem, prior);
}

cudaError_t LaunchStartStat(const Problem& problem, cudaStream_t stream) {
  const int64_t count = problem.batch * problem.intermediate_size;
  const float* past = problem.attributes.use_stat ? problem.past_stat : nullptr;
  return Launch(&StartStatKernel, Elements(count), dim3(kThreads), stream, past, count, problem.stat);
}

cudaError_t LaunchEnergy(const Problem& problem, int64_t first, int64_t rows, const float* hidden, float* energy,
                         cudaStream_t stream) {
  return Launch(&EnergyKernel, Blocks(rows), dim3(kThreads), stream, problem, first, hidden, energy);
}

cudaError_t LaunchAddStat(const Problem& problem, int64_t first, int64_t rows, const float* hidden, const float* pre,
                          const float* energy, cudaStream_t stream) {
  return Launch(&AddStatKernel, Elements(problem.intermediate_size, problem.batch), dim3(kThreads), stream, problem, first, rows,
                hidden, pre, energy);
}

cudaError_t LaunchFinish(const Problem& problem, int64_t first, int64_t rows, const float* out, cudaStream_t stream) {
  return WithType(problem.x_type, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    return Launch(&FinishKernel<X>, Elements(problem.hidden_size, rows), dim3(kThreads), stream, problem, first, out);
  });
}

}  // namespace clada::cuda
