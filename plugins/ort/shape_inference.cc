// SPDX-License-Identifier: Apache-2.0
#include "shape_inference.h"

#include <atomic>

#include "node.h"

namespace clada::ort {
namespace {

// For VisitAttributes: the flags, which outputs depend on. What is wrong with attributes is said when the kernel is made.
class FlagReader {
 public:
  explicit FlagReader(OrtShapeInferContext* context) : context_(context) {}

  void Flag(const char* name, bool& value) const {
    int64_t found = value;
    ReadIntAttribute(context_, name, &found);
    value = found == 1;
  }
  template <class Enum, size_t N>
  void Choice(const char*, Enum&, const char* const (&)[N]) const {}
  void Int(const char*, int64_t&) const {}
  void Float(const char*, float&) const {}

 private:
  OrtShapeInferContext* context_;
};

ONNXTensorElementDataType FromElementType(ElementType type) {
  switch (type) {
    case ElementType::kFloat32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case ElementType::kFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case ElementType::kBFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case ElementType::kInt8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    case ElementType::kUint8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    case ElementType::kInt32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  }
}

// What is known of the inputs that outputs follow; one of unknown rank reads like a scalar, which none of them can be.
struct Known {
  TypeAndShape x, load, w_in;
};

// An output that is not like x.
TypeAndShape Follow(const TensorInfo& info, const Known& known) {
  TypeAndShape made;
  made.type = FromElementType(info.type);
  const TensorShape& shape = info.shapes[0];
  for (int i = 0; i < shape.rank; ++i) {
    const Size size = shape.axes[i].size;
    if (size == Size::kRows) {
      made.sizes.insert(made.sizes.end(), known.load.sizes.begin(), known.load.sizes.end());
      made.symbols.insert(made.symbols.end(), known.load.symbols.begin(), known.load.symbols.end());
      continue;
    }
    const TypeAndShape& from = size == Size::kF ? known.w_in : known.x;
    const size_t axis = size == Size::kD ? from.sizes.size() - 1 : 0;
    from.sizes.empty() ? made.Add(-1, NewSymbol()) : made.Add(from.sizes[axis], from.symbols[axis]);
  }
  return made;
}

}  // namespace

// The runtime takes a size of -1 without a name for a real size, so every open size needs a name; a new one each time, since
// equal names mean equal sizes.
std::string NewSymbol() {
  static std::atomic<uint64_t> count{0};
  return "com.clada.size_" + std::to_string(count++);
}

// The C++ wrapper of the headers is avoided: it writes -2 for symbolic sizes, which the runtime refuses.
bool ReadShape(OrtShapeInferContext* context, size_t input, TypeAndShape* shape) {
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

OrtStatusPtr WriteShape(OrtShapeInferContext* context, size_t output, const TypeAndShape& shape) {
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

bool ReadIntAttribute(OrtShapeInferContext* context, const char* name, int64_t* value) {
  const OrtOpAttr* attribute = nullptr;
  if (!Ort::Status(Ort::GetApi().ShapeInferContext_GetAttribute(context, name, &attribute)).IsOK()) return false;
  size_t size = 0;
  return Ort::Status(Ort::GetApi().ReadOpAttr(attribute, ORT_OP_ATTR_INT, value, sizeof(*value), &size)).IsOK();
}

ElementType ToElementType(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return ElementType::kFloat32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return ElementType::kFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return ElementType::kBFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return ElementType::kInt8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return ElementType::kUint8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return ElementType::kInt32;
    default: return ElementType::kOther;
  }
}

OrtStatusPtr ORT_API_CALL InferShapes(const OrtCustomOp*, OrtShapeInferContext* context) {
  return Guard([&]() -> OrtStatusPtr {
    Known known;
    TypeAndShape &x = known.x, &load = known.load;
    const auto read = [&](Input input, TypeAndShape* shape) { return ReadShape(context, static_cast<size_t>(input), shape); };
    if (!read(Input::kX, &x)) return nullptr;
    const bool has_load = read(Input::kLoad, &load);
    if (!read(Input::kWIn, &known.w_in)) known.w_in.sizes.clear();
    // An x of unknown rank has the rows that load has, and the other way round.
    if (x.sizes.empty() && !load.sizes.empty()) {
      x.sizes = load.sizes, x.symbols = load.symbols;
      x.Add(-1, NewSymbol());
    } else if (load.sizes.size() + 1 != x.sizes.size()) {
      load = x;
      if (!load.sizes.empty()) load.sizes.pop_back(), load.symbols.pop_back();
    }
    Attributes attributes;
    FlagReader reader(context);
    VisitAttributes(attributes, reader);
    size_t index = 0;
    for (const Output output : Outputs(attributes)) {
      const TensorInfo& info = Info(output);
      const bool like_x = info.rule != TypeRule::kFixed, by_row = info.shapes[0].axes[0].size == Size::kRows;
      const size_t at = index++;
      if (like_x ? x.sizes.empty() : by_row && !has_load) continue;
      if (OrtStatusPtr status = WriteShape(context, at, like_x ? x : Follow(info, known))) return status;
    }
    return nullptr;
  });
}

}  // namespace clada::ort
