// SPDX-License-Identifier: Apache-2.0
#ifndef CLADA_ORT_SHAPE_INFERENCE_H_
#define CLADA_ORT_SHAPE_INFERENCE_H_

#include "sparse_ffn_op.h"

namespace clada::ort {

ElementType ToElementType(ONNXTensorElementDataType type);

// y as x; stat float32 [B, f]; active int32 as load. What is not known stays open.
OrtStatusPtr ORT_API_CALL InferShapes(const OrtCustomOp* op, OrtShapeInferContext* context);

}  // namespace clada::ort

#endif  // CLADA_ORT_SHAPE_INFERENCE_H_
