// SPDX-License-Identifier: Apache-2.0
// Attributes as TensorRT's plugin fields: how ONNX's parser hands them to us, and how an engine keeps them.
#ifndef CLADA_TRT_FIELDS_H_
#define CLADA_TRT_FIELDS_H_

#include <NvInferRuntime.h>

#include <deque>
#include <string>
#include <vector>

#include "clada/contract.h"

namespace clada::trt {

// Beside the attributes, an engine keeps these two.
constexpr char kNodeField[] = "clada_node";        // for messages
constexpr char kVersionField[] = "clada_version";  // of the library that counted the workspace

class FieldReader final : public AttributeReader {
 public:
  FieldReader(const std::string& node, const nvinfer1::PluginFieldCollection* fields) : node_(node), fields_(fields) {}

  bool Int(const char* name, int64_t* value) const override;
  bool Float(const char* name, float* value) const override;
  bool String(const char* name, std::string* value) const override;

  // Throws ContractError when there is a field of another name: a misspelt attribute must not pass for its default.
  void RefuseOthers(const std::vector<std::string>& known) const;

 private:
  const nvinfer1::PluginField* Find(const char* name, const char* wanted, std::initializer_list<nvinfer1::PluginFieldType> types,
                                    bool single) const;

  const std::string& node_;
  const nvinfer1::PluginFieldCollection* fields_;
};

// Fields that own their values. TensorRT reads them until the object is gone, so it is neither copied nor moved.
class Fields final : public AttributeWriter {
 public:
  Fields() = default;
  Fields(const Fields&) = delete;
  Fields& operator=(const Fields&) = delete;

  void Int(const char* name, int64_t value) override;
  void Float(const char* name, float value) override;
  void String(const char* name, const char* value) override;

  // With names and types only, as a creator lists them.
  void DropValues();
  const nvinfer1::PluginFieldCollection* Collection();
  std::vector<std::string> Names() const;
  // "activation=silu, gated=1, ...", all of them.
  std::string Text() const;

 private:
  struct Value {
    int32_t integer = 0;
    float real = 0.0f;
    std::string text;
  };
  std::deque<Value> values_;  // its elements stay where they are
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace clada::trt

#endif  // CLADA_TRT_FIELDS_H_
