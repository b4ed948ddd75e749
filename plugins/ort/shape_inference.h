// SPDX-License-Identifier: Apache-2.0
#ifndef CLADA_ORT_SHAPE_INFERENCE_H_
#define CLADA_ORT_SHAPE_INFERENCE_H_

#include "sparse_ffn_op.h"

namespace clada::ort {

struct TypeAndShape {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<int64_t> sizes;        // -1: not known
  std::vector<std::string> symbols;  // a name where the size is not known, else empty

  void Add(int64_t size, const std::string& symbol) { sizes.push_back(size), symbols.push_back(symbol); }
};

// A name for a size that is not known, another each time.
std::string NewSymbol();
// What is known of an input; false if nothing is. One of unknown rank reads like a scalar.
bool ReadShape(OrtShapeInferContext* context, size_t input, TypeAndShape* shape);
OrtStatusPtr WriteShape(OrtShapeInferContext* context, size_t output, const TypeAndShape& shape);
// False if the node has no such attribute of that type.
bool ReadIntAttribute(OrtShapeInferContext* context, const char* name, int64_t* value);

ElementType ToElementType(ONNXTensorElementDataType type);

// y as x; stat float32 [B, f]; active int32 as load. What is not known stays open.
OrtStatusPtr ORT_API_CALL InferShapes(const OrtCustomOp* op, OrtShapeInferContext* context);

}  // namespace clada::ort

#endif  // CLADA_ORT_SHAPE_INFERENCE_H_
