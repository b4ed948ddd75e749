// SPDX-License-Identifier: Apache-2.0
// The ONNX Runtime shell of com.clada::SparseFFN: turns ORT's tensors into a clada::Problem, and gives it ORT's threads and
// memory.
#ifndef CLADA_ORT_SPARSE_FFN_OP_H_
#define CLADA_ORT_SPARSE_FFN_OP_H_

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <string>
#include <vector>

#include "clada/contract.h"
#include "weight_memory.h"

namespace clada::ort {

// The first version with ParallelFor and with shape inference. Newer runtimes serve it; only its calls are used.
constexpr uint32_t kApiVersion = 17;

class SparseFFNKernel {
 public:
  SparseFFNKernel(const OrtKernelInfo* info, WeightMemory weights);
  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

 private:
  void Compute(OrtKernelContext* context);
  KeptWeight Keep(const OrtKernelInfo* info, Input input, WeightMemory weights) const;

  std::string node_;
  Attributes attributes_;
  bool threshold_checked_ = false;
  const Kernels* kernels_ = nullptr;
  const InstructionSet* set_ = nullptr;
  Ort::MemoryInfo memory_;
  KeptWeight w_in_, w_out_;  // of quantised weights that are constants; else null
};

// Which inputs and outputs follow the required ones depends on the attributes, so both lists end in a variadic part.
struct SparseFFNOp : Ort::CustomOpBase<SparseFFNOp, SparseFFNKernel, true> {
  explicit SparseFFNOp(WeightMemory weights = WeightMemory::kOwn);
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const noexcept;

  const char* GetName() const { return kOpName; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return kRequiredInputs + 1; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index == kRequiredInputs ? INPUT_OUTPUT_VARIADIC : INPUT_OUTPUT_REQUIRED;
  }
  int GetVariadicInputMinArity() const { return 0; }
  bool GetVariadicInputHomogeneity() const { return false; }
  size_t GetOutputTypeCount() const { return kRequiredOutputs + 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const {
    return index == kRequiredOutputs ? INPUT_OUTPUT_VARIADIC : INPUT_OUTPUT_REQUIRED;
  }
  int GetVariadicOutputMinArity() const { return 0; }
  bool GetVariadicOutputHomogeneity() const { return false; }

 private:
  WeightMemory weights_;
};

}  // namespace clada::ort

#endif  // CLADA_ORT_SPARSE_FFN_OP_H_
