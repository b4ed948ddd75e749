// SPDX-License-Identifier: Apache-2.0
#include "clada/contract.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace clada {
namespace {

using Shape = std::vector<int64_t>;

constexpr const char* kActivations[] = {"silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"};
constexpr const char* kScores[] = {"gate", "exact", "shadow", "prefix", "external"};
constexpr const char* kRules[] = {"threshold", "relative", "topk"};
constexpr const char* kCombines[] = {"sum", "weighted"};
constexpr const char* kStatNorms[] = {"row", "none"};
constexpr const char* kFormats[] = {"plain"};

std::string Text(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string Text(float value) {
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%.9g", static_cast<double>(value));
  return buffer;
}

const char* TypeName(ElementType type) {
  switch (type) {
    case ElementType::kFloat32: return "float32";
    case ElementType::kFloat16: return "float16";
    case ElementType::kBFloat16: return "bfloat16";
    case ElementType::kInt8: return "int8";
    case ElementType::kInt32: return "int32";
    default: return "another type";
  }
}

[[noreturn]] void Fail(const std::string& node, const std::string& what) {
  throw ContractError("SparseFFN node '" + node + "': " + what);
}

template <class Enum, size_t N>
Enum Choice(const std::string& node, const AttributeReader& reader, const char* name, const char* const (&allowed)[N],
            Enum value) {
  std::string found;
  if (!reader.String(name, &found)) return value;
  std::string list;
  for (size_t i = 0; i < N; ++i) {
    if (found == allowed[i]) return static_cast<Enum>(i);
    list += (i ? ", " : "") + std::string(allowed[i]);
  }
  Fail(node, std::string("attribute '") + name + "' is '" + found + "'; allowed: " + list);
}

bool Flag(const std::string& node, const AttributeReader& reader, const char* name, bool value) {
  int64_t found = value;
  reader.Int(name, &found);
  if (found != 0 && found != 1)
    Fail(node, std::string("attribute '") + name + "' is " + std::to_string(found) + "; allowed: 0, 1");
  return found == 1;
}

float Number(const std::string& node, const AttributeReader& reader, const char* name, float value) {
  reader.Float(name, &value);
  if (!std::isfinite(value)) Fail(node, std::string("attribute '") + name + "' is " + Text(value) + "; it must be finite");
  return value;
}

class Checker {
 public:
  Checker(const std::string& node, const Attributes& attributes, const std::vector<TensorView>& tensors)
      : node_(node), order_(Inputs(attributes)), tensors_(tensors) {
    if (tensors.size() != order_.size())
      Fail(node, "has " + std::to_string(tensors.size()) + " inputs; its attributes want " + std::to_string(order_.size()) +
                     ": " + Names());
  }

  const TensorView& Get(Input input, std::initializer_list<ElementType> types) const {
    const TensorView& tensor = tensors_[std::find(order_.begin(), order_.end(), input) - order_.begin()];
    if (std::find(types.begin(), types.end(), tensor.type) == types.end()) {
      std::string wanted;
      for (const ElementType type : types) wanted += (wanted.empty() ? "" : " or ") + std::string(TypeName(type));
      const std::string found = tensor.type == ElementType::kOther ? tensor.type_name : TypeName(tensor.type);
      Fail(node_, Name(input) + " has type " + found + "; wanted " + wanted);
    }
    return tensor;
  }

  // The data of an input that must have one of the shapes.
  template <class T = float>
  const T* Want(Input input, ElementType type, std::initializer_list<Shape> shapes) const {
    const TensorView& tensor = Get(input, {type});
    CheckShape(input, tensor, shapes);
    return static_cast<const T*>(tensor.data);
  }

  void CheckShape(Input input, const TensorView& tensor, std::initializer_list<Shape> shapes) const {
    if (std::find(shapes.begin(), shapes.end(), tensor.shape) != shapes.end()) return;
    std::string wanted;
    for (const Shape& shape : shapes) wanted += (wanted.empty() ? "" : " or ") + Text(shape);
    ShapeError(input, tensor, "wanted " + wanted);
  }

  [[noreturn]] void ShapeError(Input input, const TensorView& tensor, const std::string& wanted) const {
    Fail(node_, Name(input) + " has shape " + Text(tensor.shape) + "; " + wanted);
  }

 private:
  static std::string Name(Input input) { return std::string("input '") + InputName(input) + "'"; }
  std::string Names() const {
    std::string names;
    for (const Input input : order_) names += (names.empty() ? "" : ", ") + std::string(InputName(input));
    return names;
  }

  const std::string& node_;
  const std::vector<Input> order_;
  const std::vector<TensorView>& tensors_;
};

// The bytes of the character of UTF-8 that starts at `at`; 0 if there is none, or one that is not printed.
size_t CharacterAt(const std::string& text, size_t at) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const unsigned first = byte(at);
  if (first < 0x80) return first >= 0x20 && first != 0x7f;
  const size_t size = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4) return 0;
  uint32_t point = first & (0x7fu >> size);
  for (size_t i = 1; i < size; ++i) {
    if ((byte(at + i) & 0xc0u) != 0x80u) return 0;
    point = point << 6 | (byte(at + i) & 0x3fu);
  }
  constexpr uint32_t kLeast[] = {0xa0, 0x800, 0x10000};  // 0x80 to 0x9f are control characters
  const bool surrogate = point >= 0xd800 && point <= 0xdfff;
  return point >= kLeast[size - 2] && point <= 0x10ffff && !surrogate ? size : 0;
}

}  // namespace

std::string Printable(const std::string& text) {
  std::string shown;
  for (size_t at = 0; at < text.size();) {
    const size_t size = CharacterAt(text, at);
    if (size > 0) {
      shown.append(text, at, size);
    } else {
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), "\\x%02x", static_cast<unsigned>(static_cast<unsigned char>(text[at])));
      shown += escaped;
    }
    at += std::max<size_t>(size, 1);
  }
  return shown;
}

Attributes ReadAttributes(const std::string& node, const AttributeReader& reader) {
  Attributes a;
  a.activation = Choice(node, reader, "activation", kActivations, a.activation);
  a.gated = Flag(node, reader, "gated", a.gated);
  Choice(node, reader, "weight_format", kFormats, 0);
  a.score = Choice(node, reader, "score", kScores, a.score);
  a.rule = Choice(node, reader, "rule", kRules, a.rule);
  reader.Int("granule", &a.granule);
  if (a.granule < 1 || a.granule > INT32_MAX)
    Fail(node, "attribute 'granule' is " + std::to_string(a.granule) + "; it must be at least 1 and below 2^31");
  a.combine = Choice(node, reader, "combine", kCombines, a.combine);
  a.load_slope = Number(node, reader, "load_slope", a.load_slope);
  a.load_min = Number(node, reader, "load_min", a.load_min);
  a.load_max = Number(node, reader, "load_max", a.load_max);
  a.use_stat = Flag(node, reader, "use_stat", a.use_stat);
  a.backbone_min = Number(node, reader, "backbone_min", a.backbone_min);
  a.prior_gamma = Number(node, reader, "prior_gamma", a.prior_gamma);
  a.emit_stat = Flag(node, reader, "emit_stat", a.emit_stat);
  a.stat_norm = Choice(node, reader, "stat_norm", kStatNorms, a.stat_norm);
  a.emit_active = Flag(node, reader, "emit_active", a.emit_active);
  a.has_bias = Flag(node, reader, "has_bias", a.has_bias);
  if (!(a.load_min > 0.0f && a.load_min <= a.load_max))
    Fail(node, "load_min is " + Text(a.load_min) + " and load_max is " + Text(a.load_max) +
                   "; 0 < load_min <= load_max is needed");
  if (a.backbone_min < 0.0f || a.prior_gamma < 0.0f)
    Fail(node, "backbone_min is " + Text(a.backbone_min) + " and prior_gamma is " + Text(a.prior_gamma) +
                   "; neither may be negative");
  if (!a.use_stat && (a.score == Score::kPrefix || a.backbone_min > 0.0f || a.prior_gamma > 0.0f))
    Fail(node, "score 'prefix', backbone_min and prior_gamma need use_stat = 1; use_stat is 0");
  if (a.combine == Combine::kWeighted && a.score != Score::kExternal)
    Fail(node, std::string("combine 'weighted' needs score 'external'; score is '") + kScores[static_cast<int>(a.score)] + "'");
  return a;
}

void WriteAttributes(const Attributes& a, AttributeWriter& writer) {
  writer.String("activation", kActivations[static_cast<int>(a.activation)]);
  writer.Int("gated", a.gated);
  writer.String("weight_format", kFormats[0]);
  writer.String("score", kScores[static_cast<int>(a.score)]);
  writer.String("rule", kRules[static_cast<int>(a.rule)]);
  writer.Int("granule", a.granule);
  writer.String("combine", kCombines[static_cast<int>(a.combine)]);
  writer.Float("load_slope", a.load_slope);
  writer.Float("load_min", a.load_min);
  writer.Float("load_max", a.load_max);
  writer.Int("use_stat", a.use_stat);
  writer.Float("backbone_min", a.backbone_min);
  writer.Float("prior_gamma", a.prior_gamma);
  writer.Int("emit_stat", a.emit_stat);
  writer.String("stat_norm", kStatNorms[static_cast<int>(a.stat_norm)]);
  writer.Int("emit_active", a.emit_active);
  writer.Int("has_bias", a.has_bias);
}

const char* InputName(Input input) {
  static const char* const kNames[] = {"x",      "load",         "w_in",  "w_out",     "threshold", "neuron_scale", "shadow",
                                       "shadow_scale", "score", "past_stat", "gate_bias", "up_bias",      "down_bias"};
  return kNames[static_cast<int>(input)];
}

std::vector<Input> Inputs(const Attributes& a) {
  std::vector<Input> inputs = {Input::kX, Input::kLoad, Input::kWIn, Input::kWOut, Input::kThreshold};
  if (a.score == Score::kExact || a.score == Score::kShadow) inputs.push_back(Input::kNeuronScale);
  if (a.score == Score::kShadow) inputs.insert(inputs.end(), {Input::kShadow, Input::kShadowScale});
  if (a.score == Score::kExternal) inputs.push_back(Input::kScore);
  if (a.use_stat) inputs.push_back(Input::kPastStat);
  if (a.has_bias && a.gated) inputs.push_back(Input::kGateBias);
  if (a.has_bias) inputs.insert(inputs.end(), {Input::kUpBias, Input::kDownBias});
  return inputs;
}

void CheckThreshold(const std::string& node, const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!(values[i] >= 0.0f))
      Fail(node, "input 'threshold' has the value " + Text(values[i]) + " at " + std::to_string(i) +
                     "; wanted numbers that are at least 0");
}

Problem MakeProblem(const std::string& node, const Attributes& a, const std::vector<TensorView>& inputs, bool check_threshold) {
  const Checker check(node, a, inputs);
  constexpr ElementType kFloat = ElementType::kFloat32;
  Problem p;
  p.attributes = a;
  const int64_t n = p.projections();

  const TensorView& w_in = check.Get(Input::kWIn, {kFloat, ElementType::kFloat16, ElementType::kBFloat16});
  if (w_in.shape.size() != 3 || w_in.shape[1] != n || w_in.shape[0] < 1 || w_in.shape[2] < 1)
    check.ShapeError(Input::kWIn, w_in, "wanted [f, " + std::to_string(n) + ", d], f and d at least 1");
  // `active` counts neurons in 32 bits, and so do the lists of those that are chosen.
  if (w_in.shape[0] > INT32_MAX) check.ShapeError(Input::kWIn, w_in, "wanted fewer than 2^31 neurons");
  const int64_t f = p.intermediate_size = w_in.shape[0];
  const int64_t d = p.hidden_size = w_in.shape[2];
  p.weight_type = static_cast<FloatType>(w_in.type);
  p.w_in = w_in.data;
  const TensorView& x = check.Get(Input::kX, {kFloat, w_in.type});
  p.x_type = static_cast<FloatType>(x.type);
  if (x.shape.empty() || x.shape.back() != d)
    check.ShapeError(Input::kX, x, "its last axis must be " + std::to_string(d) + ", the width of w_in");
  p.x = x.data;
  if (a.granule > f || f % a.granule)
    Fail(node, "input 'w_in' has " + std::to_string(f) + " neurons; they must be divisible by granule " +
                   std::to_string(a.granule));
  const int64_t granules = p.granules();
  const TensorView& w_out = check.Get(Input::kWOut, {w_in.type});
  check.CheckShape(Input::kWOut, w_out, {{f, d}});
  p.w_out = w_out.data;

  const Shape rows(x.shape.begin(), x.shape.end() - 1);
  p.load = check.Want(Input::kLoad, kFloat, {rows});
  const TensorView& threshold = check.Get(Input::kThreshold, {kFloat});
  if (a.rule == Rule::kTopk)
    check.CheckShape(Input::kThreshold, threshold, {{1}});
  else
    check.CheckShape(Input::kThreshold, threshold, {{1}, {granules}});
  p.threshold = static_cast<const float*>(threshold.data);
  p.threshold_count = threshold.shape[0];
  if (check_threshold) CheckThreshold(node, p.threshold, p.threshold_count);

  if (a.score == Score::kExact || a.score == Score::kShadow) p.neuron_scale = check.Want(Input::kNeuronScale, kFloat, {{f}});
  if (a.score == Score::kShadow) {
    if (d % kShadowBlock)
      check.ShapeError(Input::kWIn, w_in, "score 'shadow' wants d divisible by " + std::to_string(kShadowBlock));
    p.shadow = check.Want<uint8_t>(Input::kShadow, ElementType::kInt8, {{f, n, d / 2}});
    p.shadow_scale = check.Want<uint16_t>(Input::kShadowScale, ElementType::kFloat16, {{f, n, d / kShadowBlock, 2}});
  }
  const bool sequences = x.shape.size() == 3;
  if ((a.use_stat || a.emit_stat) && !sequences) check.ShapeError(Input::kX, x, "the prompt statistic wants [B, S, d]");
  p.batch = sequences ? rows[0] : 1;
  p.sequence = 1;
  // Where one axis is 0 the others may be anything, and their product need not fit a number.
  if (std::find(rows.begin(), rows.end(), 0) != rows.end())
    p.sequence = 0;
  else
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows[i] < 0 || rows[i] > INT32_MAX / (p.sequence * (i > 0 && sequences ? p.batch : 1)))
        check.ShapeError(Input::kX, x, "wanted fewer than 2^31 rows");
      if (i > 0 || !sequences) p.sequence *= rows[i];
    }
  if (a.score == Score::kExternal) {
    Shape full = rows;
    full.push_back(granules);
    p.score_per_sequence = sequences && check.Get(Input::kScore, {kFloat}).shape.size() == 2;
    p.score = p.score_per_sequence ? check.Want(Input::kScore, kFloat, {{rows[0], granules}, full})
                                   : check.Want(Input::kScore, kFloat, {full});
  }
  if (a.use_stat) p.past_stat = check.Want(Input::kPastStat, kFloat, {{rows[0], f}});
  if (a.has_bias) {
    if (a.gated) p.gate_bias = check.Want(Input::kGateBias, kFloat, {{f}});
    p.up_bias = check.Want(Input::kUpBias, kFloat, {{f}});
    p.down_bias = check.Want(Input::kDownBias, kFloat, {{d}});
  }
  return p;
}

}  // namespace clada
