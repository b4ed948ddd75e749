// SPDX-License-Identifier: Apache-2.0
// What a node may look like: attributes by name, inputs by attributes, shapes that belong together. Every refusal is a
// ContractError that names the node, the input, the value found and the value wanted.
#ifndef CLADA_CONTRACT_H_
#define CLADA_CONTRACT_H_

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "clada/sparse_ffn.h"

namespace clada {

// `text` with every byte that is no printable character of UTF-8 as \xNN: a node's name and strings are a stranger's, and messages
// go to terminals, and to bindings that take nothing but UTF-8.
std::string Printable(const std::string& text);

class ContractError : public std::runtime_error {
 public:
  explicit ContractError(const std::string& text) : std::runtime_error(Printable(text)) {}
};

struct TensorView {
  ElementType type = ElementType::kOther;
  std::string type_name;  // for messages, when type is kOther
  std::vector<int64_t> shape;
  const void* data = nullptr;
};

// How a shell reads a node's attributes. Each returns false when the node does not have it, and throws ContractError when it
// has another type.
class AttributeReader {
 public:
  virtual ~AttributeReader() = default;
  virtual bool Int(const char* name, int64_t* value) const = 0;
  virtual bool Float(const char* name, float* value) const = 0;
  virtual bool String(const char* name, std::string* value) const = 0;
};

// Reads and checks all attributes.
Attributes ReadAttributes(const std::string& node, const AttributeReader& reader);

// The reverse: how a shell stores them.
class AttributeWriter {
 public:
  virtual ~AttributeWriter() = default;
  virtual void Int(const char* name, int64_t value) = 0;
  virtual void Float(const char* name, float value) = 0;
  virtual void String(const char* name, const char* value) = 0;
};

// For shells whose kernels know numbers only: throws ContractError when the weights are quantised.
void WantPlainWeights(const std::string& node, const Attributes& attributes);

// Writes all attributes, also those that have their default, in the contract's order.
void WriteAttributes(const Attributes& attributes, AttributeWriter& writer);

// The inputs of a node in their order; every one of them is connected.
std::vector<Input> Inputs(const Attributes& attributes);
std::vector<Output> Outputs(const Attributes& attributes);

// Throws ContractError when a node has other numbers of inputs or outputs than its attributes want.
void CheckCounts(const std::string& node, const Attributes& attributes, size_t inputs, size_t outputs);

// The types that an input may have, by those of x and w_in; the latter is not looked at before w_in itself.
bool Allowed(const Attributes& attributes, Input input, ElementType type, ElementType x, ElementType w_in);

// Checks types and shapes and fills a problem's sizes and input pointers. `inputs` follow Inputs(attributes). The threshold's
// values are read unless `check_threshold` is false (a constant that was checked before).
Problem MakeProblem(const std::string& node, const Attributes& attributes, const std::vector<TensorView>& inputs,
                    bool check_threshold);

// The shape of an output; `x` is that of the input x.
std::vector<int64_t> OutputShape(const Problem& problem, const std::vector<int64_t>& x, Output output);

// No value may be negative or NaN.
void CheckThreshold(const std::string& node, const float* values, int64_t count);

}  // namespace clada

#endif  // CLADA_CONTRACT_H_
