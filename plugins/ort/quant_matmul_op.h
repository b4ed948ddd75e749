// SPDX-License-Identifier: Apache-2.0
// The ONNX Runtime shell of com.clada::QuantMatMul.
#ifndef CLADA_ORT_QUANT_MATMUL_OP_H_
#define CLADA_ORT_QUANT_MATMUL_OP_H_

#include "clada/quant_matmul.h"
#include "sparse_ffn_op.h"
#include "weight_memory.h"

namespace clada::ort {

class QuantMatMulKernel {
 public:
  QuantMatMulKernel(const OrtKernelInfo* info, WeightMemory weights);
  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

 private:
  void Compute(OrtKernelContext* context);
  // The weight and the bias, checked, if both are constants: calls look at x alone, as between two reads of weights from memory the
  // runtime's own data are in no cache.
  void ReadConstants(const Ort::ConstKernelInfo& info, WeightMemory weights);
  quant::Problem Bind(Ort::KernelContext& context, TensorView* x) const;

  std::string node_;
  quant::Attributes attributes_;
  bool constant_ = false;
  quant::Problem problem_;  // with constant_
  KeptWeight weight_;       // with constant_
  const quant::Kernels* kernels_ = nullptr;
  Ort::MemoryInfo memory_;
};

// The bias is there with has_bias, so the list of inputs ends in a variadic part.
struct QuantMatMulOp : Ort::CustomOpBase<QuantMatMulOp, QuantMatMulKernel, true> {
  explicit QuantMatMulOp(WeightMemory weights = WeightMemory::kOwn);
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const noexcept;

  const char* GetName() const { return quant::kOpName; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return quant::kRequiredInputs + 1; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index == quant::kRequiredInputs ? INPUT_OUTPUT_VARIADIC : INPUT_OUTPUT_REQUIRED;
  }
  int GetVariadicInputMinArity() const { return 0; }
  bool GetVariadicInputHomogeneity() const { return false; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }

 private:
  WeightMemory weights_;
};

}  // namespace clada::ort

#endif  // CLADA_ORT_QUANT_MATMUL_OP_H_
