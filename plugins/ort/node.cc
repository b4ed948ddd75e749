// SPDX-License-Identifier: Apache-2.0
#include "node.h"

#include <cstdlib>
#include <new>

#include "shape_inference.h"

namespace clada::ort {
namespace {

bool Status(OrtStatus* status) { return Ort::Status(status).IsOK(); }

}  // namespace

bool NodeAttributes::Int(const char* name, int64_t* value) const {
  return Has(name, "an int", Status(Ort::GetApi().KernelInfoGetAttribute_int64(info_, name, value)));
}

bool NodeAttributes::Float(const char* name, float* value) const {
  float found;
  if (!Has(name, "a float", Status(Ort::GetApi().KernelInfoGetAttribute_float(info_, name, &found)))) return false;
  *value = found;
  return true;
}

bool NodeAttributes::String(const char* name, std::string* value) const {
  size_t size = 0;
  if (!Has(name, "a string", Status(Ort::GetApi().KernelInfoGetAttribute_string(info_, name, nullptr, &size)))) return false;
  std::string found(size, '\0');
  Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAttribute_string(info_, name, found.data(), &size));
  found.resize(size ? size - 1 : 0);
  *value = found;
  return true;
}

// A failed read means that the attribute is absent, or has another type: the latter must not pass for the default.
bool NodeAttributes::Has(const char* name, const char* wanted, bool found) const {
  if (found) return true;
  int64_t number;
  float real;
  size_t size = 0;
  const char* other = nullptr;
  if (Status(Ort::GetApi().KernelInfoGetAttribute_int64(info_, name, &number))) other = "an int";
  else if (Status(Ort::GetApi().KernelInfoGetAttribute_float(info_, name, &real))) other = "a float";
  else if (Status(Ort::GetApi().KernelInfoGetAttribute_string(info_, name, nullptr, &size))) other = "a string";
  else if (Status(Ort::GetApi().KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size))) other = "a list of ints";
  else if (Status(Ort::GetApi().KernelInfoGetAttributeArray_float(info_, name, nullptr, &size))) other = "a list of floats";
  if (other)
    throw ContractError(std::string(op_) + " node '" + node_ + "': attribute '" + name + "' is " + other + "; wanted " + wanted);
  return false;
}

void RefuseInstructionSet(const char* op, const std::string& node) {
  const char* wanted = std::getenv("CLADA_ISA");
  throw ContractError(std::string(op) + " node '" + node + "': CLADA_ISA is '" + (wanted ? wanted : "") + "'; wanted " +
                      InstructionSetNames() + ", and one that this machine has");
}

ParallelFor HostThreads(OrtKernelContext* context) {
  ParallelFor threads;
  threads.host = context;
  threads.run = [](void* at, size_t count, ParallelBody body, void* user) {
    Ort::KernelContext(static_cast<OrtKernelContext*>(at)).ParallelFor(body, count, 0, user);
  };
  return threads;
}

Attributes ReadNode(const std::string& node, const OrtKernelInfo* raw) {
  const Ort::ConstKernelInfo info(raw);
  const Attributes attributes = ReadAttributes(node, NodeAttributes(kOpName, node, raw));
  CheckCounts(node, attributes, info.GetInputCount(), info.GetOutputCount());
  return attributes;
}

TensorView View(Ort::ConstValue value) {
  const Ort::TensorTypeAndShapeInfo info = value.GetTensorTypeAndShapeInfo();
  TensorView view;
  view.type = ToElementType(info.GetElementType());
  if (view.type == ElementType::kOther) view.type_name = "ONNX type " + std::to_string(info.GetElementType());
  view.shape = info.GetShape();
  view.data = value.GetTensorRawData();
  return view;
}

Problem Bind(const std::string& node, const Attributes& attributes, Ort::KernelContext& context, bool check_threshold) {
  std::vector<TensorView> views;
  views.reserve(context.GetInputCount());
  for (size_t i = 0; i < context.GetInputCount(); ++i) {
    const Ort::ConstValue value = context.GetInput(i);
    if (!value)
      throw ContractError("SparseFFN node '" + node + "': input " + std::to_string(i) + " ('" +
                          Info(Inputs(attributes).at(i)).name + "') is not connected; no input is optional");
    views.push_back(View(value));
  }
  Problem problem = MakeProblem(node, attributes, views, check_threshold);

  const std::vector<Output> outputs = Outputs(attributes);
  for (size_t i = 0; i < outputs.size(); ++i) {
    Ort::UnownedValue value = context.GetOutput(i, OutputShape(problem, views[0].shape, outputs[i]));
    if (!value)
      throw ContractError("SparseFFN node '" + node + "': output " + std::to_string(i) +
                          " is not connected; no output is optional");
    SetOutput(problem, outputs[i], value.GetTensorMutableRawData());
  }
  return problem;
}

Scratch::Scratch(const OrtKernelContext* context, const OrtMemoryInfo* memory, size_t bytes) {
  Ort::ThrowOnError(Ort::GetApi().KernelContext_GetAllocator(context, memory, &allocator_));
  data_ = allocator_->Alloc(allocator_, bytes);
  if (data_ == nullptr) {
    Ort::GetApi().ReleaseAllocator(allocator_);
    throw std::bad_alloc();
  }
}

Scratch::~Scratch() {
  allocator_->Free(allocator_, data_);
  Ort::GetApi().ReleaseAllocator(allocator_);
}

}  // namespace clada::ort
