// SPDX-License-Identifier: Apache-2.0
#include "sparse_ffn_op.h"

#include <cstdlib>

#include "node.h"
#include "shape_inference.h"

namespace clada::ort {

SparseFFNKernel::SparseFFNKernel(const OrtKernelInfo* raw, WeightMemory weights)
    : node_(Ort::ConstKernelInfo(raw).GetNodeName()),
      memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)) {
  const Ort::ConstKernelInfo info(raw);
  attributes_ = ReadNode(node_, raw);
  kernels_ = FindKernels(std::getenv("CLADA_ISA"));
  set_ = FindInstructionSet(std::getenv("CLADA_ISA"));
  if (kernels_ == nullptr) RefuseInstructionSet(kOpName, node_);
  int constant = 0;
  const Ort::ConstValue threshold = info.GetTensorConstantInput(static_cast<size_t>(Input::kThreshold), &constant);
  if (constant) {
    const TensorView view = View(threshold);
    if (view.type == ElementType::kFloat32) {
      CheckThreshold(node_, static_cast<const float*>(view.data),
                     static_cast<int64_t>(threshold.GetTensorTypeAndShapeInfo().GetElementCount()));
      threshold_checked_ = true;
    }
  }
  if (attributes_.weight_format == WeightFormat::kPlain) return;
  w_in_ = Keep(raw, Input::kWIn, weights);
  w_out_ = Keep(raw, Input::kWOut, weights);
}

KeptWeight SparseFFNKernel::Keep(const OrtKernelInfo* raw, Input input, WeightMemory weights) const {
  int constant = 0;
  const Ort::ConstValue value = Ort::ConstKernelInfo(raw).GetTensorConstantInput(static_cast<size_t>(input), &constant);
  if (!constant || View(value).type != ElementType::kUint8) return nullptr;  // another type is refused by the first call
  return KeepWeight(value.GetTensorRawData(), value.GetTensorTypeAndShapeInfo().GetElementCount(), weights);
}

void SparseFFNKernel::Compute(OrtKernelContext* raw) {
  Ort::KernelContext context(raw);
  Problem problem = Bind(node_, attributes_, context, !threshold_checked_);
  if (w_in_) problem.w_in = w_in_.get();
  if (w_out_) problem.w_out = w_out_.get();
  Host host;
  host.parallel_for = HostThreads(raw);
  host.kernels = kernels_;
  host.set = set_;

  const Scratch scratch(raw, memory_, ScratchBytes(problem) + 64);
  RunSparseFFN(problem, host, scratch.Aligned(64));
}

OrtStatusPtr SparseFFNKernel::ComputeV2(OrtKernelContext* context) noexcept {
  return Guard([&] { Compute(context); });
}

SparseFFNOp::SparseFFNOp(WeightMemory weights) : weights_(weights) {
  OrtCustomOp::version = kApiVersion;
  OrtCustomOp::InferOutputShapeFn = &InferShapes;
}

OrtStatusPtr SparseFFNOp::CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
  return Guard([&] { *kernel = new SparseFFNKernel(info, weights_); });
}

}  // namespace clada::ort
