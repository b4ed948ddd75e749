// SPDX-License-Identifier: Apache-2.0
// Runs the framework-free kernels of QuantMatMul over random calls, on every instruction set that the machine has. Buffers have
// exactly the bytes that the contract gives them, at odd addresses, so the sanitizers see every access beyond; instruction sets,
// schedules and rows alone must give the same bits. Then inputs that change while a call runs, and sizes at the edge of their types.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "clada/quant_matmul.h"
#include "random_calls.h"

namespace {

using namespace clada;

std::pair<float*, int64_t> scribbled;

// Writes other numbers into x before each step of a call.
void Scribble(void*, size_t count, ParallelBody body, void* context) {
  const float numbers[] = {0.0f, 0.4f, -1.0f, HUGE_VALF, -HUGE_VALF, std::nanf(""), 1e-42f, 3e38f};
  for (size_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < scribbled.second; ++k) scribbled.first[k] = numbers[Pick(0, 7)];
    body(context, i);
  }
}

std::vector<float> Call(quant::Problem p, const ParallelFor& parallel_for, const quant::Kernels& kernels) {
  Buffer<float> y(p.rows * p.attributes.out_features);
  p.y = y.data();
  const size_t bytes = quant::ScratchBytes(p);
  void* scratch = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
  std::memset(scratch, 0xff, bytes);
  quant::Run(p, parallel_for, kernels, scratch);
  std::free(scratch);
  return {y.data(), y.data() + p.rows * p.attributes.out_features};
}

bool Equal(const std::vector<float>& a, const float* b) { return std::memcmp(a.data(), b, a.size() * sizeof(float)) == 0; }

int Run(int number) {
  quant::Problem p;
  quant::Attributes& a = p.attributes;
  a.bits = quant::kFormatBits[Pick(0, quant::kFormats - 1)];
  a.out_features = Pick(1, 100);
  a.has_offset = Pick(0, 1) == 1;
  a.has_bias = Pick(0, 1) == 1;
  p.rows = Pick(0, 3) == 0 ? Pick(9, 40) : Pick(1, 8);
  p.in_features = quant::kBlock * Pick(1, 8);
  const int64_t record = quant::RecordBytes(static_cast<int>(a.bits), a.has_offset), records = p.tiles() * p.blocks();
  Buffer<float> x = Normals(p.rows * p.in_features), bias = Normals(a.has_bias ? a.out_features : 0);
  Buffer<uint8_t> weight(records * record);
  for (int64_t i = 0; i < records * record; ++i) weight.data()[i] = static_cast<uint8_t>(Pick(0, 255));
  // Scales and offsets that are finite: the high byte's exponent is not full.
  for (int64_t i = 0; i < records; ++i)
    for (int64_t at = quant::PlaneBytes(static_cast<int>(a.bits)) + 1; at < record; at += 2) weight.data()[i * record + at] &= 0xbf;
  p.x = x.data(), p.weight = weight.data(), p.bias = a.has_bias ? bias.data() : nullptr;

  std::vector<float> first;
  for (const char* isa : {"baseline", "avx2", "avxvnni", "avx512vnni", "amx", "neondot"}) {
    const quant::Kernels* kernels = quant::FindKernels(isa);
    if (kernels == nullptr) continue;
    const std::vector<float> all = Call(p, {}, *kernels);
    if (first.empty()) first = all;
    if (!Equal(all, first.data())) return std::printf("call %d: %s gives other bits\n", number, isa), 1;
    ParallelFor reverse;
    reverse.run = &Reverse;
    if (!Equal(Call(p, reverse, *kernels), first.data())) return std::printf("call %d: the schedule shows\n", number), 1;
    for (const int64_t row : {int64_t{0}, p.rows - 1}) {
      quant::Problem alone = p;
      alone.rows = 1, alone.x = p.x + row * p.in_features;
      if (!Equal(Call(alone, {}, *kernels), first.data() + row * a.out_features))
        return std::printf("call %d: a row has other bits alone\n", number), 1;
    }
    for (const float value : all)
      if (std::isnan(value)) return std::printf("call %d: NaN\n", number), 1;
  }
  // Any result, but no access beyond a buffer.
  for (const char* isa : {"baseline", "avx2", "avxvnni", "avx512vnni", "amx", "neondot"}) {
    const quant::Kernels* kernels = quant::FindKernels(isa);
    if (kernels == nullptr || number % 8) continue;
    scribbled = {x.data(), p.rows * p.in_features};
    ParallelFor scribble;
    scribble.run = &Scribble;
    Call(p, scribble, *kernels);
  }
  return 0;
}

// Shapes whose sizes do not fit are refused, without a product that overflows.
int Refusals() {
  const int64_t big = int64_t{1} << 40;
  const auto said = [](std::vector<int64_t> x, std::vector<int64_t> weight) {
    quant::Attributes a;
    a.out_features = 40;
    const TensorView rows{ElementType::kFloat32, "", std::move(x), nullptr}, matrix{ElementType::kUint8, "", std::move(weight), nullptr};
    try {
      return std::to_string(quant::MakeProblem("here", a, {rows, matrix}).rows) + " rows";
    } catch (const ContractError& error) {
      return std::string(error.what());
    }
  };
  const auto refused = [](const std::string& text) { return text.find("QuantMatMul node 'here': input 'x'") == 0; };
  int failures = 0;
  const auto expect = [&](bool holds, const char* what) { failures += holds ? 0 : (std::printf("%s\n", what), 1); };
  expect(refused(said({big, big, 64}, {2, 2, 1088})), "too many rows are taken");
  expect(refused(said({65536, 65536, 64}, {2, 2, 1088})), "2^32 rows are taken");
  expect(refused(said({-1, 64}, {2, 2, 1088})), "a negative size is taken");
  expect(refused(said({}, {2, 2, 1088})), "a scalar is taken");
  expect(said({big, 0, big, 64}, {2, 2, 1088}) == "0 rows", "no rows are refused");
  expect(said({3, 5, 64}, {2, 2, 1088}) == "15 rows", "rows are refused");
  return failures;
}

}  // namespace

int main(int count, char** arguments) {
  random_engine.seed(11);
  const int calls = count > 1 ? std::atoi(arguments[1]) : 600;
  int failures = Refusals();
  for (int i = 0; i < calls; ++i) failures += Run(i);
  std::printf("%d calls of QuantMatMul, %d failures\n", calls, failures);
  return failures ? 1 : 0;
}
