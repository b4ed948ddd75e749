// SPDX-License-Identifier: Apache-2.0
#include "quant_matmul_op.h"

#include <cstdlib>

#include "node.h"
#include "shape_inference.h"

namespace clada::ort {
namespace {

// y: float32, x's rows and out_features. What is wrong with attributes is said when the kernel is made.
OrtStatusPtr ORT_API_CALL InferShape(const OrtCustomOp*, OrtShapeInferContext* context) {
  return Guard([&]() -> OrtStatusPtr {
    TypeAndShape x;
    if (!ReadShape(context, 0, &x) || x.sizes.empty()) return nullptr;
    int64_t out_features = 0;
    const bool known = ReadIntAttribute(context, "out_features", &out_features) && out_features > 0;
    x.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    x.sizes.back() = known ? out_features : -1;
    x.symbols.back() = known ? "" : NewSymbol();
    return WriteShape(context, 0, x);
  });
}

}  // namespace

QuantMatMulKernel::QuantMatMulKernel(const OrtKernelInfo* raw)
    : node_(Ort::ConstKernelInfo(raw).GetNodeName()),
      memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)) {
  const Ort::ConstKernelInfo info(raw);
  attributes_ = quant::ReadAttributes(node_, NodeAttributes(quant::kOpName, node_, raw));
  quant::CheckCounts(node_, attributes_, info.GetInputCount(), info.GetOutputCount());
  kernels_ = quant::FindKernels(std::getenv("CLADA_ISA"));
  if (kernels_ == nullptr) RefuseInstructionSet(quant::kOpName, node_);
}

void QuantMatMulKernel::Compute(OrtKernelContext* raw) {
  Ort::KernelContext context(raw);
  std::vector<TensorView> views;
  views.reserve(context.GetInputCount());
  for (size_t i = 0; i < context.GetInputCount(); ++i) {
    const Ort::ConstValue value = context.GetInput(i);
    if (!value)
      throw ContractError(std::string(quant::kOpName) + " node '" + node_ + "': input " + std::to_string(i) + " ('" +
                          quant::kInputNames[i] + "') is not connected; no input is optional");
    views.push_back(View(value));
  }
  quant::Problem problem = quant::MakeProblem(node_, attributes_, views);
  Ort::UnownedValue y = context.GetOutput(0, quant::OutputShape(attributes_, views[0].shape));
  if (!y) throw ContractError(std::string(quant::kOpName) + " node '" + node_ + "': output 0 is not connected");
  problem.y = static_cast<float*>(y.GetTensorMutableRawData());
  if (problem.rows == 0) return;
  const Scratch scratch(raw, memory_, quant::ScratchBytes(problem) + 64);
  quant::Run(problem, HostThreads(raw), *kernels_, scratch.Aligned(64));
}

OrtStatusPtr QuantMatMulKernel::ComputeV2(OrtKernelContext* context) noexcept {
  return Guard([&] { Compute(context); });
}

QuantMatMulOp::QuantMatMulOp() {
  OrtCustomOp::version = kApiVersion;
  OrtCustomOp::InferOutputShapeFn = &InferShape;
}

OrtStatusPtr QuantMatMulOp::CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
  return Guard([&] { *kernel = new QuantMatMulKernel(info); });
}

}  // namespace clada::ort
