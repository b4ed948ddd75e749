// SPDX-License-Identifier: Apache-2.0
// Runs the framework-free kernel over random calls, on every instruction set that the machine has. Buffers have exactly the
// bytes that the contract gives them, at odd addresses, so the sanitizers see every access beyond; the instruction sets and the
// thread orders are compared with each other, and each row with itself alone. Then what random calls don't meet: sizes at the edge
// of their types, and inputs that change while a call runs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "clada/contract.h"
#include "clada/sparse_ffn.h"
#include "random_calls.h"

namespace {

using namespace clada;

// One of the contract's names of an attribute.
template <class Enum, size_t N>
Enum PickOf(const char* const (&)[N]) {
  return static_cast<Enum>(Pick(0, N - 1));
}

Buffer<float> Positives(int64_t count) {
  Buffer<float> buffer = Normals(count, 1.0f);
  for (int64_t i = 0; i < count; ++i) buffer.data()[i] = std::fabs(buffer.data()[i]);
  return buffer;
}

// float16 in [0.25, 0.5) or its negative; as bfloat16 the same bits are small numbers.
Buffer<uint16_t> Halves(int64_t count) {
  Buffer<uint16_t> buffer(count);
  for (int64_t i = 0; i < count; ++i) buffer.data()[i] = static_cast<uint16_t>(0x3400 + Pick(0, 0x3ff) + (Pick(0, 1) << 15));
  return buffer;
}

// The float32 value of 16 bits.
float Wide(FloatType type, uint16_t bits) {
  if (type == FloatType::kFloat16) {
    const int exponent = bits >> 10 & 0x1f;
    const float mantissa = static_cast<float>(bits & 0x3ff), sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 0x1f) return mantissa == 0.0f ? sign * std::numeric_limits<float>::infinity() : std::nanf("");
    return sign * (exponent ? std::ldexp(mantissa + 1024.0f, exponent - 25) : std::ldexp(mantissa, -24));
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

bool Same(const std::vector<float>& a, const std::vector<float>& b, float tolerance) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (!(std::fabs(a[i] - b[i]) <= tolerance * (1.0f + std::fabs(a[i])))) return false;
  }
  return true;
}

// What a row of x gives alone, for calls without a statistic of their own to add to.
std::vector<float> Alone(const Problem& p, const Host& host, int64_t row) {
  Problem one = p;
  const int64_t sequence = row / p.sequence, d = p.hidden_size, e = p.granules();
  one.batch = one.sequence = 1;
  one.x = static_cast<const char*>(p.x) + row * d * SizeOf(p.x_type);
  one.load = p.load + row;
  one.score = p.score + (p.score_per_sequence ? sequence : row) * e;
  if (p.past_stat) one.past_stat = p.past_stat + sequence * p.intermediate_size;
  Buffer<float> y(d), stat(p.intermediate_size);
  Buffer<uint16_t> y_half(d);
  Buffer<int32_t> active(1);
  one.y = p.x_type == FloatType::kFloat32 ? static_cast<void*>(y.data()) : y_half.data();
  one.stat = p.stat ? stat.data() : nullptr;
  one.active = p.active ? active.data() : nullptr;
  void* scratch = std::aligned_alloc(64, (ScratchBytes(one) + 64) / 64 * 64);
  RunSparseFFN(one, host, scratch);
  std::free(scratch);
  std::vector<float> all;
  for (int64_t i = 0; i < d; ++i)
    all.push_back(p.x_type == FloatType::kFloat32 ? y.data()[i] : Wide(p.x_type, y_half.data()[i]));
  return all;
}

int Run(int number) {
  Problem p;
  Attributes& a = p.attributes;
  a.activation = PickOf<Activation>(kActivationNames);
  a.gated = Pick(0, 1) == 1;
  a.score = PickOf<Score>(kScoreNames);
  a.rule = PickOf<Rule>(kRuleNames);
  a.granule = Pick(0, 3) == 0 ? Pick(1, 70) : 1;
  a.combine = a.score == Score::kExternal ? PickOf<Combine>(kCombineNames) : Combine::kSum;
  a.load_slope = 0.3f;
  a.use_stat = a.score == Score::kPrefix || Pick(0, 3) == 0;
  if (a.use_stat && Pick(0, 1)) a.backbone_min = 0.3f, a.prior_gamma = 0.2f;
  a.emit_stat = Pick(0, 1) == 1;
  a.stat_norm = PickOf<StatNorm>(kStatNormNames);
  a.emit_active = Pick(0, 1) == 1;
  a.has_bias = Pick(0, 1) == 1;
  p.batch = Pick(1, 3);
  p.sequence = Pick(0, 4) == 0 ? Pick(2, 40) : Pick(0, 6);
  p.hidden_size = a.score == Score::kShadow ? 32 * Pick(1, 5) : Pick(1, 90);
  p.intermediate_size = a.granule * Pick(1, a.granule > 1 ? 6 : 200);
  p.weight_type = static_cast<FloatType>(Pick(0, 2));

  const int64_t rows = p.rows(), d = p.hidden_size, f = p.intermediate_size, n = p.projections(), e = p.granules();
  const bool wide = p.weight_type == FloatType::kFloat32;
  if (Pick(0, 1)) p.x_type = p.weight_type;
  const bool wide_x = p.x_type == FloatType::kFloat32;
  Buffer<uint16_t> x_half = Halves(wide_x ? 0 : rows * d);
  Buffer<float> x = Normals(wide_x ? rows * d : 0, 1.0f), load = Normals(rows, 1.0f);
  // All loads dense, so that instruction sets agree: a choice could hang on the last bit. Every third call is sparse.
  const bool sparse = number % 3 == 0;
  const float special[] = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN()};
  for (int64_t r = 0; r < rows; ++r)
    if (!sparse || Pick(0, 2) == 0) load.data()[r] = special[Pick(0, 9) < 7 ? 0 : Pick(1, 2)];
  Buffer<float> w_in = Normals(wide ? f * n * d : 0, 0.2f), w_out = Normals(wide ? f * d : 0, 0.2f);
  Buffer<uint16_t> w_in_half = Halves(wide ? 0 : f * n * d), w_out_half = Halves(wide ? 0 : f * d);
  const int64_t thresholds = a.rule == Rule::kTopk || Pick(0, 1) ? 1 : e;
  Buffer<float> threshold = Positives(thresholds), scale = Positives(f), score = Positives(rows * e);
  Buffer<float> past = Positives(p.batch * f);
  Buffer<uint8_t> shadow(a.score == Score::kShadow ? f * n * d / 2 : 0);
  Buffer<uint16_t> shadow_scale = Halves(a.score == Score::kShadow ? f * n * d / 16 : 0);
  for (int64_t i = 0; a.score == Score::kShadow && i < f * n * d / 2; ++i)
    shadow.data()[i] = static_cast<uint8_t>(Pick(0, 255));
  Buffer<float> gate_bias = Normals(f, 0.1f), up_bias = Normals(f, 0.1f), down_bias = Normals(d, 0.1f);
  p.x = wide_x ? static_cast<const void*>(x.data()) : x_half.data(), p.load = load.data();
  p.w_in = wide ? static_cast<const void*>(w_in.data()) : w_in_half.data();
  p.w_out = wide ? static_cast<const void*>(w_out.data()) : w_out_half.data();
  p.threshold = threshold.data(), p.threshold_count = thresholds;
  p.neuron_scale = scale.data(), p.shadow = shadow.data(), p.shadow_scale = shadow_scale.data(), p.score = score.data();
  if (a.use_stat) p.past_stat = past.data();
  p.gate_bias = gate_bias.data(), p.up_bias = up_bias.data(), p.down_bias = down_bias.data();

  std::vector<std::vector<float>> results;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    Host host;
    host.kernels = FindKernels(isa);
    if (host.kernels == nullptr) continue;
    std::vector<float> first;
    for (const bool reverse : {false, true}) {
      if (reverse) host.parallel_for.run = &Reverse;
      Buffer<float> y(wide_x ? rows * d : 0), stat(p.batch * f);
      Buffer<uint16_t> y_half(wide_x ? 0 : rows * d);
      Buffer<int32_t> active(rows);
      p.y = wide_x ? static_cast<void*>(y.data()) : y_half.data();
      p.stat = a.emit_stat ? stat.data() : nullptr;
      p.active = a.emit_active ? active.data() : nullptr;
      const size_t bytes = ScratchBytes(p);
      void* scratch = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
      std::memset(scratch, 0xff, bytes);  // as float32, NaN: what is read before it is written shows
      RunSparseFFN(p, host, scratch);
      std::free(scratch);
      std::vector<float> all;
      for (int64_t i = 0; i < rows * d; ++i) all.push_back(wide_x ? y.data()[i] : Wide(p.x_type, y_half.data()[i]));
      if (a.emit_stat) all.insert(all.end(), stat.data(), stat.data() + p.batch * f);
      if (a.emit_active) all.insert(all.end(), active.data(), active.data() + rows);
      if (!reverse) first = all;
      if (!all.empty() && std::memcmp(first.data(), all.data(), all.size() * sizeof(float)) != 0) {
        std::printf("call %d, %s: another schedule gives other bits\n", number, isa);
        return 1;
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      const std::vector<float> alone = Alone(p, host, row);
      if (std::memcmp(alone.data(), first.data() + row * d, alone.size() * sizeof(float)) != 0) {
        std::printf("call %d, %s: row %d has other bits alone\n", number, isa, static_cast<int>(row));
        return 1;
      }
    }
    for (const float value : first)
      if (std::isnan(value)) {
        std::printf("call %d, %s: NaN\n", number, isa);
        return 1;
      }
    results.push_back(first);
  }
  // A sum next to the middle of two 16-bit numbers is rounded to either: an ulp.
  const float ulp = wide_x ? 0.0f : p.x_type == FloatType::kFloat16 ? 0x1p-10f : 0x1p-7f;
  for (size_t i = 1; !sparse && i < results.size(); ++i)
    if (!Same(results[0], results[i], 1e-3f + ulp)) {
      std::printf("call %d: instruction sets disagree\n", number);
      return 1;
    }
  return 0;
}

// A plain layer of ones: f neurons of one number each.
struct Layer {
  Layer(int64_t rows, int64_t f) : x(rows), y(rows), load(rows), w(f), active(rows) {
    std::fill_n(w.data(), f, 1.0f);
    std::fill_n(x.data(), rows, 1.0f);
    std::fill_n(load.data(), rows, 0.0f);
    p.batch = 1, p.sequence = rows, p.hidden_size = 1, p.intermediate_size = f;
    p.attributes.gated = false, p.attributes.activation = Activation::kIdentity, p.attributes.emit_active = true;
    p.x = x.data(), p.y = y.data(), p.load = load.data(), p.w_in = p.w_out = w.data(), p.active = active.data();
  }
  void Run(const Host& host) {
    void* scratch = std::aligned_alloc(64, (ScratchBytes(p) + 64) / 64 * 64);
    RunSparseFFN(p, host, scratch);
    std::free(scratch);
  }
  Problem p;
  Buffer<float> x, y, load, w;
  Buffer<int32_t> active;
};

int Expect(bool holds, const char* what) {
  if (!holds) std::printf("%s\n", what);
  return !holds;
}

// topk among more granules than float32 can count: k is exact, and stays within them.
int ManyGranules(const Host& host) {
  const int64_t f = (int64_t{1} << 24) + 3;
  Layer layer(1, f);
  layer.p.attributes.rule = Rule::kTopk;
  int failures = Expect(TopCount(16777220.0f, f) == f && TopCount(std::nanf(""), f) == 1 && TopCount(-3.0f, 5) == 1 &&
                            TopCount(16777216.0f, 16777217) == 16777216,
                        "topk takes more granules than there are, or none");
  for (const auto& [wanted, active] : {std::pair<float, int64_t>{16777216.0f, 16777216}, {16777218.0f, 16777218},
                                       {16777220.0f, f}, {3e38f, f}, {HUGE_VALF, f}, {0.0f, 1}}) {
    layer.p.threshold = &wanted;
    layer.Run(host);
    failures += Expect(layer.active.data()[0] == active, "topk of many granules takes another number of them");
  }
  return failures;
}

std::vector<std::pair<float*, int64_t>> scribbled;

// Writes other numbers into some inputs before each step of a call.
void Scribble(void*, size_t count, ParallelBody body, void* context) {
  const float numbers[] = {0.0f, 0.4f, -1.0f, HUGE_VALF, -HUGE_VALF, std::nanf(""), 1e-42f, 3e38f};
  for (size_t i = 0; i < count; ++i) {
    for (const auto& [values, size] : scribbled)
      for (int64_t k = 0; k < size; ++k) values[k] = numbers[Pick(0, 7)];
    body(context, i);
  }
}

// Inputs that change while the call reads them: any result, but no access beyond a buffer.
int ChangingInputs(Host host) {
  host.parallel_for.run = &Scribble;
  for (int i = 0; i < 300; ++i) {
    const int64_t rows = Pick(1, 40), f = Pick(1, 300);
    Layer layer(rows, f);
    Attributes& a = layer.p.attributes;
    a.rule = PickOf<Rule>(kRuleNames);
    a.score = Pick(0, 1) ? Score::kPrefix : Score::kExternal;
    a.load_slope = 0.3f, a.use_stat = a.emit_stat = true, a.prior_gamma = 0.5f, a.backbone_min = 0.2f;
    Buffer<float> score(rows * f), past(f), stat(f), threshold(1);
    scribbled = {{layer.load.data(), rows}, {score.data(), rows * f}, {past.data(), f}, {threshold.data(), 1}};
    std::fill_n(threshold.data(), 1, 0.5f);
    std::fill_n(score.data(), rows * f, 0.5f);
    std::fill_n(past.data(), f, 0.5f);
    for (int64_t r = 0; r < rows; ++r)
      if (Pick(0, 1)) layer.load.data()[r] = HUGE_VALF;
    layer.p.score = score.data(), layer.p.past_stat = past.data(), layer.p.stat = stat.data();
    layer.p.threshold = threshold.data();
    layer.Run(host);
  }
  return 0;
}

// Shapes whose sizes do not fit are refused, by the input's name and without a product that overflows.
int Refusals() {
  Attributes a;
  a.gated = false;
  const int64_t big = int64_t{1} << 40;
  const auto said = [&](std::vector<int64_t> x, std::vector<int64_t> load, int64_t f, int64_t d) {
    const auto view = [](std::vector<int64_t> shape) { return TensorView{ElementType::kFloat32, "", std::move(shape), nullptr}; };
    try {
      const Problem p = MakeProblem("here", a, {view(x), view(load), view({f, 1, d}), view({f, d}), view({1})}, false);
      return std::to_string(p.rows()) + " rows";
    } catch (const ContractError& error) {
      return std::string(error.what());
    }
  };
  const auto refused = [](const std::string& text, const char* input) {
    return text.find("node 'here'") != std::string::npos && text.find(input) != std::string::npos;
  };
  return Expect(refused(said({big, big, 4}, {big, big}, 8, 4), "'x'"), "too many rows are taken") +
         Expect(refused(said({65536, 65536, 4}, {65536, 65536}, 8, 4), "'x'"), "2^32 rows are taken") +
         Expect(refused(said({2, big, big, big, 4}, {2, big, big, big}, 8, 4), "'x'"), "a product overflows") +
         Expect(said({big, 0, big, big, 4}, {big, 0, big, big}, 8, 4) == "0 rows", "no rows are refused") +
         Expect(said({3, 5, 4}, {3, 5}, 8, 4) == "15 rows", "rows are refused") +
         Expect(refused(said({1, 4}, {1}, int64_t{1} << 31, 4), "'w_in'"), "too many neurons are taken");
}

}  // namespace

int main(int count, char** arguments) {
  random_engine.seed(7);
  const int calls = count > 1 ? std::atoi(arguments[1]) : 600;
  int failures = 0;
  for (int i = 0; i < calls; ++i) failures += Run(i);
  failures += Refusals();
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    Host host;
    host.kernels = FindKernels(isa);
    if (host.kernels) failures += ChangingInputs(host);
  }
  Host best;
  best.kernels = FindKernels(nullptr);
  failures += ManyGranules(best);
  std::printf("%d calls, %d failures\n", calls, failures);
  return failures != 0;
}
