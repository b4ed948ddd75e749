// SPDX-License-Identifier: Apache-2.0
#include "cuda_op.h"

#include <cuda_runtime_api.h>

#include "clada/sparse_ffn_cuda.h"
#include "node.h"

namespace clada::ort {
namespace {

class CudaKernel {
 public:
  explicit CudaKernel(const OrtKernelInfo* raw)
      : node_(Ort::ConstKernelInfo(raw).GetNodeName()), attributes_(ReadNode(node_, raw)) {
    WantPlainWeights(node_, attributes_);
    int constant = 0;
    const Ort::ConstValue threshold =
        Ort::ConstKernelInfo(raw).GetTensorConstantInput(static_cast<size_t>(Input::kThreshold), &constant);
    if (constant) CheckConstant(threshold);
  }

  void Compute(OrtKernelContext* raw) const {
    Ort::KernelContext context(raw);
    // Nothing on the host looks at values: `load` stays on the device, and a CUDA graph of the session can be replayed.
    const Problem problem = Bind(node_, attributes_, context, false);
    Want(cuda::CheckLimits(problem));
    const cuda::Gemm& gemm = cuda::DefaultGemm();
    // The memory that x lies in names the device. A block that is given back early is used again on this stream only.
    const OrtMemoryInfo* memory = context.GetInput(0).GetTensorMemoryInfo();
    const Scratch scratch(raw, memory, cuda::WorkspaceBytes(problem, gemm) + kAlignment);
    const auto stream = static_cast<cudaStream_t>(context.GetGPUComputeStream());
    Want(cuda::RunSparseFFN(problem, gemm, scratch.Aligned(kAlignment), stream));
  }

 private:
  static constexpr size_t kAlignment = 256;

  void Want(const std::string& error) const {
    if (!error.empty()) throw ContractError("SparseFFN node '" + node_ + "': " + error);
  }

  // Once, when the session is made: calls don't look at values.
  void CheckConstant(Ort::ConstValue threshold) const {
    const TensorView view = View(threshold);
    if (view.type != ElementType::kFloat32) return;  // refused by the first call, with the type
    const size_t count = threshold.GetTensorTypeAndShapeInfo().GetElementCount();
    std::vector<float> values(count);
    // On the host or on the device, as the runtime has placed it.
    const cudaError_t error = cudaMemcpy(values.data(), view.data, count * sizeof(float), cudaMemcpyDefault);
    if (error != cudaSuccess) Want(std::string("input 'threshold' can't be read: ") + cudaGetErrorName(error));
    CheckThreshold(node_, values.data(), static_cast<int64_t>(count));
  }

  const std::string node_;
  const Attributes attributes_;
};

}  // namespace

SparseFFNCudaOp::SparseFFNCudaOp() {
  // The base is a C struct of functions; those that make it another op are replaced.
#ifndef CLADA_CUDA_EMULATION  // for tests on a machine without a GPU
  OrtCustomOp::GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
#endif
  OrtCustomOp::CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
    return Guard([&] { *kernel = new CudaKernel(info); });
  };
  OrtCustomOp::KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return Guard([&] { static_cast<const CudaKernel*>(kernel)->Compute(context); });
  };
  OrtCustomOp::KernelDestroy = [](void* kernel) { delete static_cast<CudaKernel*>(kernel); };
}

QuantMatMulCudaOp::QuantMatMulCudaOp() {
#ifndef CLADA_CUDA_EMULATION
  OrtCustomOp::GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
#endif
  OrtCustomOp::CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void**) {
    return Guard([&] {
      throw ContractError(std::string(quant::kOpName) + " node '" + Ort::ConstKernelInfo(info).GetNodeName() +
                          "': there is no CUDA kernel of this op; export with float weights for a GPU, or run this on the CPU");
    });
  };
}

std::string CudaVersion() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

}  // namespace clada::ort
