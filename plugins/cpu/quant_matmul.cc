// SPDX-License-Identifier: Apache-2.0
#include "clada/quant_matmul.h"

#include <algorithm>
#include <thread>

#include "plan.h"
#include "quant_kernels.h"

namespace clada::quant {
namespace {

constexpr int64_t kFewRows = 8;     // of which none is left to another thread
constexpr int64_t kPassRows = 256;  // rows whose 8-bit numbers are kept at a time; then the weights are read again
constexpr int64_t kMostChunks = 16;
// Of weights, at least: less is not worth another thread, and a thread fetches ahead beyond its chunk.
constexpr int64_t kChunkBytes = 64 << 10, kSpareChunkBytes = 1 << 20;

// Where a pass's rows lie in the scratch memory.
struct Plan {
  int64_t pass_rows = 0;
  int8_t* q = nullptr;
  float* scale = nullptr;
  int32_t* sum = nullptr;
};

size_t MakePlan(const Problem& problem, void* base, Plan* plan) {
  plan->pass_rows = std::min(problem.rows, kPassRows);
  Arena arena(base);
  plan->q = arena.Take<int8_t>(plan->pass_rows * problem.in_features);
  plan->scale = arena.Take<float>(plan->pass_rows * problem.blocks());
  plan->sum = arena.Take<int32_t>(plan->pass_rows * problem.blocks());
  return arena.most();
}

int FormatOf(int64_t bits) {
  return static_cast<int>(std::find(std::begin(kFormatBits), std::end(kFormatBits), bits) - std::begin(kFormatBits));
}

// Parts of a call that reads so many bytes of weights. Small matrices are cut into two for each core, as a part more costs what it
// saves; of large ones there are more, so that a core that is busy with something else holds nobody up.
int64_t Chunks(int64_t work) {
  static const int64_t for_cores = 2 * std::max<int64_t>(1, std::thread::hardware_concurrency());
  return std::clamp<int64_t>(std::max(std::min(work / kChunkBytes, for_cores), work / kSpareChunkBytes), 1, kMostChunks);
}

// Rows [first, first + count) of the call through one tile.
void RunTile(const Problem& problem, const Kernels& kernels, const Plan& plan, int64_t tile, int64_t first, int64_t count) {
  const Attributes& a = problem.attributes;
  const int64_t blocks = problem.blocks(), n = a.out_features, column = tile * kTileRows;
  const int64_t columns = std::min(kTileRows, n - column);
  const uint8_t* weight = problem.weight + tile * blocks * RecordBytes(static_cast<int>(a.bits), a.has_offset);
  const auto product = kernels.tile[FormatOf(a.bits)][a.has_offset];
  for (int64_t r = 0; r < count; r += kernels.run_rows) {
    const int64_t rows = std::min(kernels.run_rows, count - r);
    alignas(64) float out[kMostRunRows * kTileRows];
    product(weight, {plan.q + r * problem.in_features, plan.scale + r * blocks, plan.sum + r * blocks, blocks}, rows, out);
    for (int64_t i = 0; i < rows; ++i) {
      float* y = problem.y + (first + r + i) * n + column;
      const float* of_row = out + i * kTileRows;
      for (int64_t j = 0; j < columns; ++j) y[j] = a.has_bias ? of_row[j] + problem.bias[column + j] : of_row[j];
    }
  }
}

}  // namespace

size_t ScratchBytes(const Problem& problem) {
  Plan plan;
  return MakePlan(problem, nullptr, &plan);
}

void Run(const Problem& problem, const ParallelFor& parallel_for, const Kernels& kernels, void* scratch) {
  const int64_t k = problem.in_features, blocks = problem.blocks(), tiles = problem.tiles();
  const int64_t record = RecordBytes(static_cast<int>(problem.attributes.bits), problem.attributes.has_offset);
  const Host host{parallel_for, nullptr};
  Plan plan;
  MakePlan(problem, scratch, &plan);
  for (int64_t first = 0; first < problem.rows; first += plan.pass_rows) {
    const int64_t count = std::min(plan.pass_rows, problem.rows - first);
    const auto round = [&](int64_t r) {
      kernels.quantise(problem.x + (first + r) * k, blocks, plan.q + r * k, plan.scale + r * blocks, plan.sum + r * blocks);
    };
    // A few rows are done sooner than other threads have begun.
    if (count <= kFewRows)
      for (int64_t r = 0; r < count; ++r) round(r);
    else
      Parallel(host, CeilDiv(count, kFewRows), [&](int64_t run) {
        for (int64_t r = run * kFewRows; r < std::min(count, (run + 1) * kFewRows); ++r) round(r);
      });
    const int64_t work = tiles * blocks * record * CeilDiv(count, kFewRows);
    const int64_t chunks = std::min(tiles, Chunks(work));
    Parallel(host, chunks, [&](int64_t chunk) {
      for (int64_t tile = tiles * chunk / chunks; tile < tiles * (chunk + 1) / chunks; ++tile)
        RunTile(problem, kernels, plan, tile, first, count);
    });
  }
}

}  // namespace clada::quant
