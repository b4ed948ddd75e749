// SPDX-License-Identifier: Apache-2.0
#include "sparse_ffn_op.h"

#include <cstdlib>

#include "node.h"
#include "shape_inference.h"

namespace clada::ort {
namespace {

// ORT's GEMM on memory that we own.
struct GemmHost {
  OrtKernelContext* context;
  const Ort::MemoryInfo* memory;
  Ort::Op* plain;
  Ort::Op* transposed;

  static void Run(void* host, bool transpose_b, int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c) {
    auto& self = *static_cast<GemmHost*>(host);
    const auto tensor = [&](const float* data, int64_t rows, int64_t columns) {
      const int64_t shape[] = {rows, columns};
      const size_t size = static_cast<size_t>(rows * columns);
      return Ort::Value::CreateTensor<float>(*self.memory, const_cast<float*>(data), size, shape, 2);
    };
    const Ort::Value inputs[] = {tensor(a, m, k), transpose_b ? tensor(b, n, k) : tensor(b, k, n)};
    Ort::Value outputs[] = {tensor(c, m, n)};
    (transpose_b ? self.transposed : self.plain)->Invoke(self.context, inputs, 2, outputs, 1);
  }
};

Ort::Op MakeGemm(const OrtKernelInfo* info, int64_t transpose_b) {
  const int64_t no = 0;
  const float one = 1.0f;
  // Attributes without a value have no default here: all must be given.
  const Ort::OpAttr attributes[] = {
      Ort::OpAttr("transA", &no, 1, ORT_OP_ATTR_INT), Ort::OpAttr("transB", &transpose_b, 1, ORT_OP_ATTR_INT),
      Ort::OpAttr("alpha", &one, 1, ORT_OP_ATTR_FLOAT), Ort::OpAttr("beta", &one, 1, ORT_OP_ATTR_FLOAT)};
  const char* constraint = "T";
  const ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  return Ort::Op::Create(info, "Gemm", "", 13, &constraint, &type, 1, attributes, 4, 2, 1);
}

const Kernels* ChooseKernels(const std::string& node) {
  const char* wanted = std::getenv("CLADA_ISA");
  const Kernels* kernels = FindKernels(wanted);
  if (kernels == nullptr)
    throw ContractError("SparseFFN node '" + node + "': CLADA_ISA is '" + wanted +
                        "'; wanted avx512, avx2 or baseline, and one that this machine has");
  return kernels;
}

}  // namespace

SparseFFNKernel::SparseFFNKernel(const OrtKernelInfo* raw)
    : node_(Ort::ConstKernelInfo(raw).GetNodeName()),
      memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)) {
  const Ort::ConstKernelInfo info(raw);
  attributes_ = ReadNode(node_, raw);
  kernels_ = ChooseKernels(node_);
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
  gemm_ = MakeGemm(raw, 0);
  gemm_transposed_ = MakeGemm(raw, 1);
}

void SparseFFNKernel::Compute(OrtKernelContext* raw) {
  Ort::KernelContext context(raw);
  const Problem problem = Bind(node_, attributes_, context, !threshold_checked_);

  GemmHost gemm{raw, &memory_, &gemm_, &gemm_transposed_};
  Host host;
  host.parallel_for.host = raw;
  host.parallel_for.run = [](void* at, size_t count, ParallelBody body, void* user) {
    Ort::KernelContext(static_cast<OrtKernelContext*>(at)).ParallelFor(body, count, 0, user);
  };
  host.gemm.run = &GemmHost::Run;
  host.gemm.host = &gemm;
  host.kernels = kernels_;

  const Scratch scratch(raw, memory_, ScratchBytes(problem) + 64);
  RunSparseFFN(problem, host, scratch.Aligned(64));
}

OrtStatusPtr SparseFFNKernel::ComputeV2(OrtKernelContext* context) noexcept {
  return Guard([&] { Compute(context); });
}

SparseFFNOp::SparseFFNOp() {
  OrtCustomOp::version = kApiVersion;
  OrtCustomOp::InferOutputShapeFn = &InferShapes;
}

OrtStatusPtr SparseFFNOp::CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
  return Guard([&] { *kernel = new SparseFFNKernel(info); });
}

}  // namespace clada::ort
