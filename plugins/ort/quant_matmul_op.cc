// SPDX-License-Identifier: Apache-2.0
#include "quant_matmul_op.h"

#include <cstdlib>

#include "node.h"
#include "shape_inference.h"

namespace clada::ort {
namespace {

constexpr size_t kStackBytes = 16 << 10;  // a row's scratch memory, as wide as most

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

QuantMatMulKernel::QuantMatMulKernel(const OrtKernelInfo* raw, WeightMemory weights)
    : node_(Ort::ConstKernelInfo(raw).GetNodeName()),
      memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)) {
  const Ort::ConstKernelInfo info(raw);
  attributes_ = quant::ReadAttributes(node_, NodeAttributes(quant::kOpName, node_, raw));
  quant::CheckCounts(node_, attributes_, info.GetInputCount(), info.GetOutputCount());
  kernels_ = quant::FindKernels(std::getenv("CLADA_ISA"));
  if (kernels_ == nullptr) RefuseInstructionSet(quant::kOpName, node_);
  ReadConstants(info, weights);
}

void QuantMatMulKernel::ReadConstants(const Ort::ConstKernelInfo& info, WeightMemory weights) {
  std::vector<TensorView> views(1);
  for (size_t i = 1; i < info.GetInputCount(); ++i) {
    int constant = 0;
    const Ort::ConstValue value = info.GetTensorConstantInput(i, &constant);
    if (!constant) return;
    views.push_back(View(value));
  }
  const TensorView& weight = views[1];
  if (weight.type != ElementType::kUint8 || weight.shape.size() != 3) return;  // refused by the first call
  views[0].type = ElementType::kFloat32;
  views[0].shape = {0, weight.shape[1] * quant::kBlock};
  problem_ = quant::MakeProblem(node_, attributes_, views);
  int64_t bytes = 1;
  for (const int64_t size : weight.shape) bytes *= size;
  weight_ = KeepWeight(weight.data, static_cast<size_t>(bytes), weights);
  problem_.weight = static_cast<const uint8_t*>(weight_.get());
  constant_ = true;
}

quant::Problem QuantMatMulKernel::Bind(Ort::KernelContext& context, TensorView* x) const {
  const auto view = [&](size_t i) {
    const Ort::ConstValue value = context.GetInput(i);
    if (!value)
      throw ContractError(std::string(quant::kOpName) + " node '" + node_ + "': input " + std::to_string(i) + " ('" +
                          quant::kInputNames[i] + "') is not connected; no input is optional");
    return View(value);
  };
  *x = view(0);
  if (constant_) {
    quant::Problem problem = problem_;
    quant::SetRows(node_, *x, &problem);
    return problem;
  }
  std::vector<TensorView> views = {*x};
  for (size_t i = 1; i < context.GetInputCount(); ++i) views.push_back(view(i));
  return quant::MakeProblem(node_, attributes_, views);
}

void QuantMatMulKernel::Compute(OrtKernelContext* raw) {
  Ort::KernelContext context(raw);
  TensorView x;
  quant::Problem problem = Bind(context, &x);
  Ort::UnownedValue y = context.GetOutput(0, quant::OutputShape(attributes_, x.shape));
  if (!y) throw ContractError(std::string(quant::kOpName) + " node '" + node_ + "': output 0 is not connected");
  problem.y = static_cast<float*>(y.GetTensorMutableRawData());
  if (problem.rows == 0) return;
  const size_t bytes = quant::ScratchBytes(problem);
  if (bytes <= kStackBytes) {
    alignas(64) char scratch[kStackBytes];
    quant::Run(problem, HostThreads(raw), *kernels_, scratch);
  } else {
    const Scratch scratch(raw, memory_, bytes + 64);
    quant::Run(problem, HostThreads(raw), *kernels_, scratch.Aligned(64));
  }
}

OrtStatusPtr QuantMatMulKernel::ComputeV2(OrtKernelContext* context) noexcept {
  return Guard([&] { Compute(context); });
}

QuantMatMulOp::QuantMatMulOp(WeightMemory weights) : weights_(weights) {
  OrtCustomOp::version = kApiVersion;
  OrtCustomOp::InferOutputShapeFn = &InferShape;
}

OrtStatusPtr QuantMatMulOp::CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
  return Guard([&] { *kernel = new QuantMatMulKernel(info, weights_); });
}

}  // namespace clada::ort
