// SPDX-License-Identifier: Apache-2.0
#include "shape_inference.h"

namespace clada::ort {
namespace {

bool Flag(OrtShapeInferContext* context, const char* name) {
  const OrtOpAttr* attribute = nullptr;
  if (!Ort::Status(Ort::GetApi().ShapeInferContext_GetAttribute(context, name, &attribute)).IsOK()) return false;
  int64_t value = 0;
  size_t size = 0;
  return Ort::Status(Ort::GetApi().ReadOpAttr(attribute, ORT_OP_ATTR_INT, &value, sizeof(value), &size)).IsOK() && value == 1;
}

struct Shape {
  std::vector<int64_t> sizes;         // -1: not known
  std::vector<std::string> symbols;  // a name, or empty
};

// The C++ wrapper of the headers is avoided: it writes -2 for symbolic sizes, which the runtime refuses.
bool Read(OrtShapeInferContext* context, size_t input, Shape* shape) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  const OrtApi& api = Ort::GetApi();
  if (!Ort::Status(api.ShapeInferContext_GetInputTypeShape(context, input, &info)).IsOK() || info == nullptr) return false;
  size_t rank = 0;
  if (!Ort::Status(api.GetDimensionsCount(info, &rank)).IsOK()) return false;
  std::vector<const char*> names(rank, nullptr);
  shape->sizes.assign(rank, -1);
  if (rank == 0) return true;
  if (!Ort::Status(api.GetDimensions(info, shape->sizes.data(), rank)).IsOK()) return false;
  if (!Ort::Status(api.GetSymbolicDimensions(info, names.data(), rank)).IsOK()) return false;
  for (const char* name : names) shape->symbols.emplace_back(name ? name : "");
  return true;
}

OrtStatusPtr Write(OrtShapeInferContext* context, size_t output, ONNXTensorElementDataType type, const Shape* shape) {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatusPtr status = api.CreateTensorTypeAndShapeInfo(&info)) return status;
  OrtStatusPtr status = api.SetTensorElementType(info, type);
  if (!status && shape && !shape->sizes.empty()) {
    status = api.SetDimensions(info, shape->sizes.data(), shape->sizes.size());
    std::vector<const char*> names;
    for (const std::string& symbol : shape->symbols) names.push_back(symbol.c_str());
    if (!status) status = api.SetSymbolicDimensions(info, names.data(), names.size());
  }
  if (!status) status = api.ShapeInferContext_SetOutputTypeShape(context, output, info);
  api.ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

}  // namespace

ElementType ToElementType(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return ElementType::kFloat32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return ElementType::kFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return ElementType::kBFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return ElementType::kInt8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return ElementType::kInt32;
    default: return ElementType::kOther;
  }
}

OrtStatusPtr ORT_API_CALL InferShapes(const OrtCustomOp*, OrtShapeInferContext* context) {
  try {
    Shape x, load, weights;
    if (!Read(context, 0, &x)) return nullptr;
    if (OrtStatusPtr status = Write(context, 0, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &x)) return status;
    size_t output = 1;
    if (Flag(context, "emit_stat")) {
      const bool known = Read(context, 2, &weights) && x.sizes.size() == 3 && weights.sizes.size() == 3;
      Shape stat;
      if (known) {
        stat.sizes = {x.sizes[0], weights.sizes[0]};
        stat.symbols = {x.symbols[0], weights.symbols[0]};
      }
      if (OrtStatusPtr status = Write(context, output++, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, known ? &stat : nullptr))
        return status;
    }
    if (Flag(context, "emit_active")) {
      const bool known = Read(context, 1, &load);
      return Write(context, output, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, known ? &load : nullptr);
    }
    return nullptr;
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  }
}

}  // namespace clada::ort
