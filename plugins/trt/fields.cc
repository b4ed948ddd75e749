// SPDX-License-Identifier: Apache-2.0
#include "fields.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace clada::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

std::string TypeName(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kFLOAT16: return "a float16";
    case PluginFieldType::kFLOAT32: return "a float32";
    case PluginFieldType::kFLOAT64: return "a float64";
    case PluginFieldType::kINT8: return "an int8";
    case PluginFieldType::kINT16: return "an int16";
    case PluginFieldType::kINT32: return "an int32";
    case PluginFieldType::kINT64: return "an int64";
    case PluginFieldType::kCHAR: return "a string";
    case PluginFieldType::kDIMS: return "a Dims";
    default: return "a plugin field of type " + std::to_string(static_cast<int32_t>(type));
  }
}

}  // namespace

const PluginField* FieldReader::Find(const char* name, const char* wanted, std::initializer_list<PluginFieldType> types,
                                     bool single) const {
  for (int32_t i = 0; fields_ && i < fields_->nbFields; ++i) {
    const PluginField& field = fields_->fields[i];
    if (field.name == nullptr || std::strcmp(field.name, name) != 0) continue;
    if (field.data == nullptr) return nullptr;
    const std::string what = "SparseFFN node '" + node_ + "': attribute '" + name + "' ";
    if (std::find(types.begin(), types.end(), field.type) == types.end())
      throw ContractError(what + "is " + TypeName(field.type) + "; wanted " + wanted);
    if (single && field.length != 1)
      throw ContractError(what + "has " + std::to_string(field.length) + " values; wanted 1");
    return &field;
  }
  return nullptr;
}

bool FieldReader::Int(const char* name, int64_t* value) const {
  const PluginField* field = Find(name, "an int32", {PluginFieldType::kINT32, PluginFieldType::kINT64}, true);
  if (field == nullptr) return false;
  *value = field->type == PluginFieldType::kINT32 ? *static_cast<const int32_t*>(field->data)
                                                  : *static_cast<const int64_t*>(field->data);
  return true;
}

bool FieldReader::Float(const char* name, float* value) const {
  const PluginField* field = Find(name, "a float32", {PluginFieldType::kFLOAT32}, true);
  if (field == nullptr) return false;
  *value = *static_cast<const float*>(field->data);
  return true;
}

bool FieldReader::String(const char* name, std::string* value) const {
  const PluginField* field = Find(name, "a string", {PluginFieldType::kCHAR}, false);
  if (field == nullptr) return false;
  // Some hosts count the closing NUL, some don't.
  value->assign(static_cast<const char*>(field->data), static_cast<size_t>(std::max(field->length, 0)));
  value->erase(std::find(value->begin(), value->end(), '\0'), value->end());
  return true;
}

void FieldReader::RefuseOthers(const std::vector<std::string>& known) const {
  for (int32_t i = 0; fields_ && i < fields_->nbFields; ++i) {
    const std::string name = fields_->fields[i].name ? fields_->fields[i].name : "";
    if (std::find(known.begin(), known.end(), name) != known.end()) continue;
    std::string list;
    for (const std::string& other : known) list += (list.empty() ? "" : ", ") + other;
    throw ContractError("SparseFFN node '" + node_ + "': attribute '" + name + "' is unknown; known are " + list);
  }
}

void Fields::Int(const char* name, int64_t value) {
  values_.emplace_back().integer = static_cast<int32_t>(value);
  fields_.emplace_back(name, &values_.back().integer, PluginFieldType::kINT32, 1);
}

void Fields::Float(const char* name, float value) {
  values_.emplace_back().real = value;
  fields_.emplace_back(name, &values_.back().real, PluginFieldType::kFLOAT32, 1);
}

void Fields::String(const char* name, const char* value) {
  const std::string& text = values_.emplace_back().text = value;
  fields_.emplace_back(name, text.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(text.size() + 1));
}

void Fields::DropValues() {
  for (PluginField& field : fields_) field.data = nullptr, field.length = 1;
}

const nvinfer1::PluginFieldCollection* Fields::Collection() {
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
  return &collection_;
}

std::vector<std::string> Fields::Names() const {
  std::vector<std::string> names;
  for (const PluginField& field : fields_) names.emplace_back(field.name);
  return names;
}

std::string Fields::Text() const {
  std::string text;
  for (size_t i = 0; i < fields_.size(); ++i) {
    char number[32];
    std::snprintf(number, sizeof(number), "%.9g", static_cast<double>(values_[i].real));
    text += (i ? ", " : "") + std::string(fields_[i].name) + "=";
    text += fields_[i].type == PluginFieldType::kINT32     ? std::to_string(values_[i].integer)
            : fields_[i].type == PluginFieldType::kFLOAT32 ? number
                                                           : values_[i].text;
  }
  return text;
}

}  // namespace clada::trt
