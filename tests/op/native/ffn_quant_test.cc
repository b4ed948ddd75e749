// SPDX-License-Identifier: Apache-2.0
// Runs the framework-free kernels of SparseFFN with quantised weights over random calls, on every instruction set that the machine
// has, as quant_test.cc does with QuantMatMul's: buffers of exactly the contract's bytes, equal bits for all schedules and for rows
// alone, and inputs that change while a call runs.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "clada/quant_matmul_tables.h"
#include "clada/sparse_ffn.h"
#include "random_calls.h"

namespace {

using namespace clada;

// Random codes, and scales that are finite where `is_scale(i)` says that bytes i and i + 1 are one.
template <class IsScale>
Buffer<uint8_t> Weights(int64_t bytes, const IsScale& is_scale) {
  Buffer<uint8_t> buffer(bytes);
  for (int64_t i = 0; i < bytes; ++i) buffer.data()[i] = static_cast<uint8_t>(Pick(0, 255));
  for (int64_t i = 0; i < bytes; i += 2)
    if (is_scale(i)) buffer.data()[i + 1] &= 0xbf;
  return buffer;
}

struct Changing {
  float* x;
  int64_t count;
  float* load;
  int64_t rows;
} changing;

// Writes other numbers into x and load before each step of a call.
void Scribble(void*, size_t count, ParallelBody body, void* context) {
  const float numbers[] = {0.0f, 0.4f, -1.0f, HUGE_VALF, -HUGE_VALF, std::nanf(""), 1e-42f, 3e38f};
  for (size_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < changing.count; ++k) changing.x[k] = numbers[Pick(0, 7)];
    for (int64_t k = 0; k < changing.rows; ++k) changing.load[k] = numbers[Pick(0, 7)];
    body(context, i);
  }
}

struct Result {
  std::vector<float> y;
  std::vector<int32_t> active;
};

Result Call(Problem p, const ParallelFor& parallel_for, const char* isa) {
  Buffer<float> y(p.rows() * p.hidden_size);
  Buffer<int32_t> active(p.rows());
  p.y = y.data(), p.active = active.data();
  Host host;
  host.parallel_for = parallel_for;
  host.kernels = FindKernels(isa);
  host.set = FindInstructionSet(isa);
  const size_t bytes = ScratchBytes(p);
  void* scratch = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
  std::memset(scratch, 0xff, bytes);
  RunSparseFFN(p, host, scratch);
  std::free(scratch);
  return {{y.data(), y.data() + p.rows() * p.hidden_size}, {active.data(), active.data() + p.rows()}};
}

bool Equal(const Result& a, const Result& b) {
  return a.active == b.active && std::memcmp(a.y.data(), b.y.data(), a.y.size() * sizeof(float)) == 0;
}

int Run(int number) {
  const WeightFormat formats[] = {WeightFormat::kInt4, WeightFormat::kInt5, WeightFormat::kInt6, WeightFormat::kInt8};
  Problem p;
  Attributes& a = p.attributes;
  a.weight_format = formats[Pick(0, 3)];
  a.activation = Pick(0, 1) ? Activation::kRelu : Activation::kIdentity;
  a.gated = Pick(0, 1) == 1;
  a.score = Score::kExact;
  a.rule = static_cast<Rule>(Pick(0, 2));
  a.has_bias = Pick(0, 1) == 1;
  p.batch = 1, p.sequence = Pick(0, 3) == 0 ? Pick(5, 40) : Pick(1, 8);
  p.hidden_size = 32 * Pick(1, 10), p.intermediate_size = 32 * Pick(1, 6);
  const int64_t rows = p.rows(), d = p.hidden_size, f = p.intermediate_size, groups = f / 32;
  const int64_t record = quant::RecordBytes(FormatBits(a.weight_format), false), group = d * record / 32;
  Buffer<float> x = Normals(rows * d), load = Normals(rows), threshold(1), scale = Normals(f), gate_bias = Normals(f),
                up_bias = Normals(f), down_bias = Normals(d);
  const float special[] = {HUGE_VALF, -HUGE_VALF, std::nanf("")};
  for (int64_t r = 0; r < rows; ++r)
    if (Pick(0, 2) == 0) load.data()[r] = special[Pick(0, 2)];
  threshold.data()[0] = a.rule == Rule::kTopk ? static_cast<float>(Pick(1, f)) : a.rule == Rule::kRelative ? 0.2f : 1e4f;
  for (int64_t j = 0; j < f; ++j) scale.data()[j] = std::fabs(scale.data()[j]);
  Buffer<uint8_t> w_in =
      Weights(p.projections() * groups * (d / 32) * record, [&](int64_t i) { return i % record >= record - quant::kScaleBytes; });
  Buffer<uint8_t> w_out = Weights(groups * group, [&](int64_t i) { return i % group >= group - 2 * d; });
  p.x = x.data(), p.load = load.data(), p.w_in = w_in.data(), p.w_out = w_out.data();
  p.threshold = threshold.data(), p.neuron_scale = scale.data();
  if (a.has_bias) p.gate_bias = gate_bias.data(), p.up_bias = up_bias.data(), p.down_bias = down_bias.data();

  Result first;
  const char* const sets[] = {"baseline", "avx2", "avxvnni", "avx512", "avx512vnni", "amx", "neondot"};
  for (const char* isa : sets) {
    if (FindInstructionSet(isa) == nullptr) continue;
    const Result all = Call(p, {}, isa);
    if (first.y.empty()) first = all;
    if (!Equal(all, first)) return std::printf("call %d: %s gives other bits\n", number, isa), 1;
    ParallelFor reverse;
    reverse.run = &Reverse;
    if (!Equal(Call(p, reverse, isa), first)) return std::printf("call %d: the schedule shows\n", number), 1;
    for (const int64_t row : {int64_t{0}, rows - 1}) {
      Problem alone = p;
      alone.sequence = 1, alone.x = x.data() + row * d, alone.load = p.load + row;
      const Result one = Call(alone, {}, isa);
      if (one.active[0] != first.active[row] || std::memcmp(one.y.data(), first.y.data() + row * d, d * sizeof(float)) != 0)
        return std::printf("call %d: a row has other bits alone\n", number), 1;
    }
    for (const float value : all.y)
      if (std::isnan(value)) return std::printf("call %d: NaN\n", number), 1;
  }
  for (const char* isa : sets) {
    if (FindInstructionSet(isa) == nullptr || number % 8) continue;
    changing = {x.data(), rows * d, load.data(), rows};
    ParallelFor scribble;
    scribble.run = &Scribble;
    Call(p, scribble, isa);
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  random_engine.seed(17);
  const int calls = count > 1 ? std::atoi(arguments[1]) : 400;
  int failures = 0;
  for (int i = 0; i < calls; ++i) failures += Run(i);
  std::printf("%d calls of SparseFFN with quantised weights, %d failures\n", calls, failures);
  return failures ? 1 : 0;
}
