// SPDX-License-Identifier: Apache-2.0
#include "clada/contract.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "clada/quant_matmul_tables.h"

namespace clada {
namespace {

using Shape = std::vector<int64_t>;

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

std::string Text(const char* text) { return text; }
std::string Text(int64_t value) { return std::to_string(value); }
std::string Text(bool value) { return value ? "1" : "0"; }

const char* TypeName(ElementType type) { return kElementTypeNames[static_cast<int>(type)]; }

[[noreturn]] void Fail(const std::string& node, const std::string& what) {
  throw ContractError("SparseFFN node '" + node + "': " + what);
}

template <size_t N>
std::string List(const char* const (&names)[N]) {
  std::string list;
  for (const char* name : names) list += (list.empty() ? "" : ", ") + std::string(name);
  return list;
}

// Of inputs.
std::string Names(const std::vector<Input>& inputs) {
  std::string names;
  for (const Input input : inputs) names += (names.empty() ? "" : ", ") + std::string(Info(input).name);
  return names;
}

// For VisitAttributes: what the node has, checked one by one.
class Read {
 public:
  Read(const std::string& node, const AttributeReader& reader) : node_(node), reader_(reader) {}

  template <class Enum, size_t N>
  void Choice(const char* name, Enum& value, const char* const (&names)[N]) const {
    std::string found;
    if (!reader_.String(name, &found)) return;
    const auto at = std::find(std::begin(names), std::end(names), found);
    if (at == std::end(names)) Refuse(name, "'" + found + "'; allowed: " + List(names));
    value = static_cast<Enum>(at - std::begin(names));
  }
  void Flag(const char* name, bool& value) const {
    int64_t found = value;
    reader_.Int(name, &found);
    if (found != 0 && found != 1) Refuse(name, std::to_string(found) + "; allowed: 0, 1");
    value = found == 1;
  }
  void Int(const char* name, int64_t& value) const { reader_.Int(name, &value); }
  void Float(const char* name, float& value) const {
    reader_.Float(name, &value);
    if (!std::isfinite(value)) Refuse(name, Text(value) + "; it must be finite");
  }

 private:
  [[noreturn]] void Refuse(const char* name, const std::string& what) const {
    Fail(node_, std::string("attribute '") + name + "' is " + what);
  }

  const std::string& node_;
  const AttributeReader& reader_;
};

class Write {
 public:
  explicit Write(AttributeWriter& writer) : writer_(writer) {}

  template <class Enum, size_t N>
  void Choice(const char* name, Enum value, const char* const (&names)[N]) const {
    writer_.String(name, names[static_cast<int>(value)]);
  }
  void Flag(const char* name, bool value) const { writer_.Int(name, value); }
  void Int(const char* name, int64_t value) const { writer_.Int(name, value); }
  void Float(const char* name, float value) const { writer_.Float(name, value); }

 private:
  AttributeWriter& writer_;
};

// What an axis of a shape is in a call; not for kRows, which are several.
int64_t SizeOf(const Axis& axis, const Problem& p) {
  const int64_t record = quant::RecordBytes(FormatBits(p.attributes.weight_format), false);
  switch (axis.size) {
    case Size::kB: return p.batch / axis.number;
    case Size::kD: return p.hidden_size / axis.number;
    case Size::kF: return p.intermediate_size / axis.number;
    case Size::kN: return p.projections() / axis.number;
    case Size::kE: return p.granules() / axis.number;
    case Size::kT: return p.projections() * p.intermediate_size / quant::kTileRows / axis.number;
    case Size::kR: return record / axis.number;
    case Size::kQ: return p.hidden_size * record / quant::kBlock / axis.number;
    default: return axis.number;
  }
}

// A shape of the contract in numbers, with `rows` for its axes of that name.
Shape ShapeOf(const TensorShape& shape, const Problem& p, const Shape& rows) {
  Shape made;
  for (int i = 0; i < shape.rank; ++i) {
    if (shape.axes[i].size == Size::kRows)
      made.insert(made.end(), rows.begin(), rows.end());
    else
      made.push_back(SizeOf(shape.axes[i], p));
  }
  return made;
}

// found == ShapeOf(shape, p, rows), without memory for it: this runs in every call.
bool Matches(const Shape& found, const TensorShape& shape, const Problem& p, const Shape& rows) {
  auto at = found.begin();
  for (int i = 0; i < shape.rank; ++i) {
    const bool several = shape.axes[i].size == Size::kRows;
    const auto count = static_cast<std::ptrdiff_t>(several ? rows.size() : 1);
    if (found.end() - at < count) return false;
    if (several ? !std::equal(rows.begin(), rows.end(), at) : *at != SizeOf(shape.axes[i], p)) return false;
    at += count;
  }
  return at == found.end();
}

bool NamesBatch(const TensorShape& shape) {
  return std::any_of(shape.axes, shape.axes + shape.rank, [](const Axis& axis) { return axis.size == Size::kB; });
}

// A node's inputs, by name.
class Tensors {
 public:
  Tensors(const std::string& node, const Attributes& attributes, const std::vector<TensorView>& tensors)
      : node_(node), attributes_(attributes), order_(Inputs(attributes)), tensors_(tensors) {
    if (tensors.size() != order_.size()) CheckCounts(node, attributes, tensors.size(), Outputs(attributes).size());
  }

  const std::vector<Input>& order() const { return order_; }
  const TensorView& operator[](Input input) const {
    return tensors_[std::find(order_.begin(), order_.end(), input) - order_.begin()];
  }

  void CheckType(Input input) const {
    const TensorView& tensor = (*this)[input];
    const ElementType x = (*this)[Input::kX].type, w_in = (*this)[Input::kWIn].type;
    // w_in comes first here, and x is held against it.
    const auto allowed = [&](ElementType type) {
      return input == Input::kX ? type == ElementType::kFloat32 || (type == w_in && w_in <= ElementType::kBFloat16)
                                : Allowed(attributes_, input, type, input == Input::kWIn ? ElementType::kFloat32 : x, w_in);
    };
    if (tensor.type != ElementType::kOther && allowed(tensor.type)) return;
    std::string wanted;
    for (int i = 0; i < static_cast<int>(ElementType::kOther); ++i) {
      const auto type = static_cast<ElementType>(i);
      if (allowed(type)) wanted += (wanted.empty() ? "" : " or ") + std::string(TypeName(type));
    }
    const std::string found = tensor.type == ElementType::kOther ? tensor.type_name : TypeName(tensor.type);
    Fail(node_, Name(input) + " has type " + found + "; wanted " + wanted);
  }

  void CheckShape(Input input, const Problem& p, const Shape& rows) const {
    const TensorInfo& info = Info(attributes_, input);
    const int count = OnlyFirstShape(p.attributes, input) ? 1 : info.shape_count;
    const auto applies = [&](const TensorShape& shape) { return rows.size() == 2 || !NamesBatch(shape); };
    for (int i = 0; i < count; ++i)
      if (applies(info.shapes[i]) && Matches((*this)[input].shape, info.shapes[i], p, rows)) return;
    std::string wanted;
    for (int i = 0; i < count; ++i)
      if (applies(info.shapes[i])) wanted += (wanted.empty() ? "" : " or ") + Text(ShapeOf(info.shapes[i], p, rows));
    ShapeError(input, "wanted " + wanted);
  }

  [[noreturn]] void ShapeError(Input input, const std::string& wanted) const {
    Fail(node_, Name(input) + " has shape " + Text((*this)[input].shape) + "; " + wanted);
  }

 private:
  static std::string Name(Input input) { return std::string("input '") + Info(input).name + "'"; }

  const std::string& node_;
  const Attributes& attributes_;
  const std::vector<Input> order_;
  const std::vector<TensorView>& tensors_;
};

// d and f from quantised weights. Tiles hold gate and up rows in halves, so an even number of them is a whole number of groups.
void ReadQuantisedSizes(const Tensors& tensors, Problem* p) {
  const char* format = kWeightFormatNames[static_cast<int>(p->attributes.weight_format)];
  const Shape& w_in = tensors[Input::kWIn].shape;
  const int64_t n = p->projections(), record = quant::RecordBytes(FormatBits(p->attributes.weight_format), false);
  if (w_in.size() != 3 || w_in[0] < 1 || w_in[0] % n || w_in[1] < 1 || w_in[2] != record)
    tensors.ShapeError(Input::kWIn, "wanted [" + std::string(n == 2 ? "f / 16" : "f / 32") + ", d / 32, " + std::to_string(record) +
                                        "] with weight_format '" + format + "', f and d divisible by 32");
  if (w_in[0] / n > INT32_MAX / quant::kTileRows || w_in[1] > INT32_MAX / quant::kBlock)
    tensors.ShapeError(Input::kWIn, "wanted fewer than 2^31 neurons, and a width below 2^31");
  p->intermediate_size = w_in[0] / n * quant::kTileRows;
  p->hidden_size = w_in[1] * quant::kBlock;
  tensors.CheckType(Input::kX);
  const Shape& x = tensors[Input::kX].shape;
  if (x.empty() || x.back() != p->hidden_size)
    tensors.ShapeError(Input::kX, "its last axis must be " + std::to_string(p->hidden_size) + ", the width of w_in");
}

// d, f and the weights' type, from w_in; x's type and width.
void ReadSizes(const std::string& node, const Tensors& tensors, Problem* p) {
  const Attributes& a = p->attributes;
  const Shape& w_in = tensors[Input::kWIn].shape;
  tensors.CheckType(Input::kWIn);
  if (p->quantised()) return ReadQuantisedSizes(tensors, p);
  const int64_t n = p->projections();
  if (w_in.size() != 3 || w_in[1] != n || w_in[0] < 1 || w_in[2] < 1)
    tensors.ShapeError(Input::kWIn, "wanted [f, " + std::to_string(n) + ", d], f and d at least 1");
  // `active` counts neurons in 32 bits, and so do the lists of those that are chosen.
  if (w_in[0] > INT32_MAX) tensors.ShapeError(Input::kWIn, "wanted fewer than 2^31 neurons");
  const int64_t f = p->intermediate_size = w_in[0];
  const int64_t d = p->hidden_size = w_in[2];
  p->weight_type = static_cast<FloatType>(tensors[Input::kWIn].type);
  tensors.CheckType(Input::kX);
  p->x_type = static_cast<FloatType>(tensors[Input::kX].type);
  const Shape& x = tensors[Input::kX].shape;
  if (x.empty() || x.back() != d)
    tensors.ShapeError(Input::kX, "its last axis must be " + std::to_string(d) + ", the width of w_in");
  if (a.granule > f || f % a.granule)
    Fail(node, "input 'w_in' has " + std::to_string(f) + " neurons; they must be divisible by granule " +
                   std::to_string(a.granule));
  if (a.score == Score::kShadow && d % kShadowBlock)
    tensors.ShapeError(Input::kWIn, "score 'shadow' wants d divisible by " + std::to_string(kShadowBlock));
  if ((a.use_stat || a.emit_stat) && x.size() != 3) tensors.ShapeError(Input::kX, "the prompt statistic wants [B, S, d]");
}

void ReadRows(const Tensors& tensors, const Shape& rows, Problem* p) {
  const bool sequences = rows.size() == 2;
  p->batch = sequences ? rows[0] : 1;
  p->sequence = 1;
  // Where one axis is 0 the others may be anything, and their product need not fit a number.
  if (std::find(rows.begin(), rows.end(), 0) != rows.end()) {
    p->sequence = 0;
    return;
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < 0 || rows[i] > INT32_MAX / (p->sequence * (i > 0 && sequences ? p->batch : 1)))
      tensors.ShapeError(Input::kX, "wanted fewer than 2^31 rows");
    if (i > 0 || !sequences) p->sequence *= rows[i];
  }
}

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
  Attributes attributes;
  Read read(node, reader);
  VisitAttributes(attributes, read);
  CheckConstraints(attributes, [&](const auto&... parts) { Fail(node, (Text(parts) + ...)); });
  return attributes;
}

void WriteAttributes(const Attributes& attributes, AttributeWriter& writer) {
  Write write(writer);
  VisitAttributes(attributes, write);
}

std::vector<Input> Inputs(const Attributes& attributes) {
  std::vector<Input> inputs;
  for (const Input input : kAllInputs)
    if (Has(attributes, input)) inputs.push_back(input);
  return inputs;
}

std::vector<Output> Outputs(const Attributes& attributes) {
  std::vector<Output> outputs;
  for (const Output output : kAllOutputs)
    if (Has(attributes, output)) outputs.push_back(output);
  return outputs;
}

void CheckCounts(const std::string& node, const Attributes& attributes, size_t inputs, size_t outputs) {
  const std::vector<Input> wanted = Inputs(attributes);
  const size_t results = Outputs(attributes).size();
  const auto want = [&](size_t found, const char* what, size_t count) {
    return "has " + std::to_string(found) + what + "; its attributes want " + std::to_string(count);
  };
  if (inputs != wanted.size()) Fail(node, want(inputs, " inputs", wanted.size()) + ": " + Names(wanted));
  if (outputs != results) Fail(node, want(outputs, " outputs", results));
}

bool Allowed(const Attributes& attributes, Input input, ElementType type, ElementType x, ElementType w_in) {
  const auto is_float = [](ElementType of) { return of <= ElementType::kBFloat16; };
  const TensorInfo& info = Info(attributes, input);
  switch (info.rule) {
    case TypeRule::kX: return is_float(type);
    case TypeRule::kW: return input == Input::kWIn ? is_float(type) && (x == ElementType::kFloat32 || x == type) : type == w_in;
    case TypeRule::kFixed: return type == info.type;
  }
  return false;
}

void WantPlainWeights(const std::string& node, const Attributes& attributes) {
  if (attributes.weight_format == WeightFormat::kPlain) return;
  Fail(node, std::string("attribute 'weight_format' is '") + kWeightFormatNames[static_cast<int>(attributes.weight_format)] +
                 "', for which there is no CUDA kernel; export with plain weights for a GPU, or run this on the CPU");
}

std::vector<int64_t> OutputShape(const Problem& problem, const std::vector<int64_t>& x, Output output) {
  return ShapeOf(Info(output).shapes[0], problem, Shape(x.begin(), x.end() - 1));
}

void CheckThreshold(const std::string& node, const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!(values[i] >= 0.0f))
      Fail(node, "input 'threshold' has the value " + Text(values[i]) + " at " + std::to_string(i) +
                     "; wanted numbers that are at least 0");
}

Problem MakeProblem(const std::string& node, const Attributes& attributes, const std::vector<TensorView>& inputs,
                    bool check_threshold) {
  const Tensors tensors(node, attributes, inputs);
  Problem p;
  p.attributes = attributes;
  ReadSizes(node, tensors, &p);
  const Shape& x = tensors[Input::kX].shape;
  const Shape rows(x.begin(), x.end() - 1);
  ReadRows(tensors, rows, &p);
  for (const Input input : tensors.order()) {
    tensors.CheckType(input);
    tensors.CheckShape(input, p, rows);
    SetInput(p, input, tensors[input].data);
  }
  p.threshold_count = tensors[Input::kThreshold].shape[0];
  if (check_threshold) CheckThreshold(node, p.threshold, p.threshold_count);
  p.score_per_sequence = Has(attributes, Input::kScore) && tensors[Input::kScore].shape.size() < x.size();
  return p;
}

}  // namespace clada
