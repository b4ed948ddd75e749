// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "clada/quant_matmul.h"

namespace clada::quant {
namespace {

using Shape = std::vector<int64_t>;

[[noreturn]] void Fail(const std::string& node, const std::string& what) {
  throw ContractError(std::string(kOpName) + " node '" + node + "': " + what);
}

std::string Text(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string Name(size_t input) { return std::string("input '") + kInputNames[input] + "'"; }

bool ReadFlag(const std::string& node, const AttributeReader& reader, const char* name) {
  int64_t value = 0;
  reader.Int(name, &value);
  if (value != 0 && value != 1)
    Fail(node, std::string("attribute '") + name + "' is " + std::to_string(value) + "; allowed: 0, 1");
  return value == 1;
}

void CheckType(const std::string& node, const TensorView& view, size_t input, ElementType wanted) {
  if (view.type == wanted) return;
  const char* names = kElementTypeNames[static_cast<int>(wanted)];
  const std::string found = view.type == ElementType::kOther ? view.type_name : kElementTypeNames[static_cast<int>(view.type)];
  Fail(node, Name(input) + " has type " + found + "; wanted " + names);
}

int64_t CountRows(const std::string& node, const Shape& x) {
  // Where one axis is 0 the others may be anything, and their product need not fit a number.
  if (std::find(x.begin(), x.end() - 1, 0) != x.end() - 1) return 0;
  int64_t rows = 1;
  for (auto size = x.begin(); size != x.end() - 1; ++size) {
    if (*size < 0 || *size > INT32_MAX / rows) Fail(node, Name(0) + " has shape " + Text(x) + "; wanted fewer than 2^31 rows");
    rows *= *size;
  }
  return rows;
}

}  // namespace

Attributes ReadAttributes(const std::string& node, const AttributeReader& reader) {
  Attributes a;
  if (!reader.Int("out_features", &a.out_features)) Fail(node, "attribute 'out_features' is not there; it has no default");
  if (a.out_features < 1 || a.out_features >= kMostFeatures)
    Fail(node, "attribute 'out_features' is " + std::to_string(a.out_features) + "; it must be at least 1 and below " +
                   std::to_string(kMostFeatures));
  reader.Int("bits", &a.bits);
  if (std::find(std::begin(kFormatBits), std::end(kFormatBits), a.bits) == std::end(kFormatBits))
    Fail(node, "attribute 'bits' is " + std::to_string(a.bits) + "; allowed: " + kFormatList);
  a.has_offset = ReadFlag(node, reader, "has_offset");
  a.has_bias = ReadFlag(node, reader, "has_bias");
  return a;
}

void CheckCounts(const std::string& node, const Attributes& attributes, size_t inputs, size_t outputs) {
  const size_t wanted = kRequiredInputs + (attributes.has_bias ? 1 : 0);
  if (inputs != wanted)
    Fail(node, "has " + std::to_string(inputs) + " inputs; has_bias = " + (attributes.has_bias ? "1" : "0") + " wants " +
                   std::to_string(wanted));
  if (outputs != 1) Fail(node, "has " + std::to_string(outputs) + " outputs; wanted 1");
}

Problem MakeProblem(const std::string& node, const Attributes& attributes, const std::vector<TensorView>& inputs) {
  CheckCounts(node, attributes, inputs.size(), 1);
  CheckType(node, inputs[0], 0, ElementType::kFloat32);
  CheckType(node, inputs[1], 1, ElementType::kUint8);
  Problem p;
  p.attributes = attributes;
  const Shape &x = inputs[0].shape, &weight = inputs[1].shape;
  if (x.empty() || x.back() < kBlock || x.back() % kBlock)
    Fail(node, Name(0) + " has shape " + Text(x) + "; its last axis must be a multiple of " + std::to_string(kBlock));
  p.in_features = x.back();
  const Shape wanted = {p.tiles(), p.blocks(), RecordBytes(static_cast<int>(attributes.bits), attributes.has_offset)};
  if (weight != wanted)
    Fail(node, Name(1) + " has shape " + Text(weight) + "; wanted " + Text(wanted) + ", for x of width " +
                   std::to_string(p.in_features) + ", out_features " + std::to_string(attributes.out_features) + " and bits " +
                   std::to_string(attributes.bits));
  if (attributes.has_bias) {
    CheckType(node, inputs[2], 2, ElementType::kFloat32);
    if (inputs[2].shape != Shape{attributes.out_features})
      Fail(node, Name(2) + " has shape " + Text(inputs[2].shape) + "; wanted " + Text({attributes.out_features}));
    p.bias = static_cast<const float*>(inputs[2].data);
  }
  p.rows = CountRows(node, x);
  p.x = static_cast<const float*>(inputs[0].data);
  p.weight = static_cast<const uint8_t*>(inputs[1].data);
  return p;
}

void SetRows(const std::string& node, const TensorView& x, Problem* problem) {
  CheckType(node, x, 0, ElementType::kFloat32);
  if (x.shape.empty() || x.shape.back() != problem->in_features)
    Fail(node, Name(0) + " has shape " + Text(x.shape) + "; its last axis must be " + std::to_string(problem->in_features) +
                   ", the width of the matrix");
  problem->rows = CountRows(node, x.shape);
  problem->x = static_cast<const float*>(x.data);
}

std::vector<int64_t> OutputShape(const Attributes& attributes, const std::vector<int64_t>& x) {
  Shape y = x;
  y.back() = attributes.out_features;
  return y;
}

}  // namespace clada::quant
