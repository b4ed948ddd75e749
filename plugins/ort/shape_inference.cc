// SPDX-License-Identifier: Apache-2.0
#include "shape_inference.h"

#include <atomic>

#include "node.h"

namespace clada::ort {
namespace {

bool Flag(OrtShapeInferContext* context, const char* name) {
  const OrtOpAttr* attribute = nullptr;
  if (!Ort::Status(Ort::GetApi().ShapeInferContext_GetAttribute(context, name, &attribute)).IsOK()) return false;
  int64_t value = 0;
  size_t size = 0;
  return Ort::Status(Ort::GetApi().ReadOpAttr(attribute, ORT_OP_ATTR_INT, &value, sizeof(value), &size)).IsOK() && value == 1;
}

struct TypeAndShape {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<int64_t> sizes;        // -1: not known
  std::vector<std::string> symbols;  // a name where the size is not known, else empty
};

// The runtime takes a size of -1 without a name for a real size, so every open size needs a name; a new one each time, since
// equal names mean equal sizes.
std::string NewSymbol() {
  static std::atomic<uint64_t> count{0};
  return "com.clada.size_" + std::to_string(count++);
}

// The C++ wrapper of the headers is avoided: it writes -2 for symbolic sizes, which the runtime refuses.
bool Read(OrtShapeInferContext* context, size_t input, TypeAndShape* shape) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  const OrtApi& api = Ort::GetApi();
  if (!Ort::Status(api.ShapeInferContext_GetInputTypeShape(context, input, &info)).IsOK() || info == nullptr) return false;
  if (!Ort::Status(api.GetTensorElementType(info, &shape->type)).IsOK()) return false;
  size_t rank = 0;
  if (!Ort::Status(api.GetDimensionsCount(info, &rank)).IsOK()) return false;
  std::vector<const char*> names(rank, nullptr);
  shape->sizes.assign(rank, -1);
  if (rank == 0) return true;
  if (!Ort::Status(api.GetDimensions(info, shape->sizes.data(), rank)).IsOK()) return false;
  if (!Ort::Status(api.GetSymbolicDimensions(info, names.data(), rank)).IsOK()) return false;
  for (size_t i = 0; i < rank; ++i) {
    shape->symbols.emplace_back(names[i] ? names[i] : "");
    if (shape->sizes[i] < 0 && shape->symbols[i].empty()) shape->symbols[i] = NewSymbol();
  }
  return true;
}

OrtStatusPtr Write(OrtShapeInferContext* context, size_t output, const TypeAndShape& shape) {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatusPtr status = api.CreateTensorTypeAndShapeInfo(&info)) return status;
  OrtStatusPtr status = api.SetTensorElementType(info, shape.type);
  if (!status && !shape.sizes.empty()) {
    status = api.SetDimensions(info, shape.sizes.data(), shape.sizes.size());
    std::vector<const char*> names;
    for (const std::string& symbol : shape.symbols) names.push_back(symbol.c_str());
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
  return Guard([&]() -> OrtStatusPtr {
    TypeAndShape x, load, weights;
    if (!Read(context, 0, &x)) return nullptr;
    // An x of unknown rank reads like a scalar, which x can't be; the load has the same rows.
    if (x.sizes.empty() && Read(context, 1, &load) && !load.sizes.empty()) {
      x.sizes = load.sizes, x.symbols = load.symbols;
      x.sizes.push_back(-1), x.symbols.push_back(NewSymbol());
    }
    if (!x.sizes.empty())
      if (OrtStatusPtr status = Write(context, 0, x)) return status;
    size_t output = 1;
    if (Flag(context, "emit_stat")) {
      TypeAndShape stat{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {-1, -1}, {NewSymbol(), NewSymbol()}};
      const auto copy = [&stat](size_t axis, const TypeAndShape& from) {
        stat.sizes[axis] = from.sizes[0];
        stat.symbols[axis] = from.symbols[0];
      };
      if (!x.sizes.empty()) copy(0, x);
      if (Read(context, 2, &weights) && !weights.sizes.empty()) copy(1, weights);
      if (OrtStatusPtr status = Write(context, output++, stat)) return status;
    }
    if (Flag(context, "emit_active")) {
      if (!Read(context, 1, &load)) return nullptr;
      if (load.sizes.size() + 1 != x.sizes.size()) {  // unknown rank: as x without its last axis
        load = x;
        if (!load.sizes.empty()) load.sizes.pop_back(), load.symbols.pop_back();
      }
      load.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
      return Write(context, output, load);
    }
    return nullptr;
  });
}

}  // namespace clada::ort
