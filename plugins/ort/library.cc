// SPDX-License-Identifier: Apache-2.0
// What the library exports.
#include <exception>
#include <mutex>
#include <string>

#include "quant_matmul_op.h"
#include "sparse_ffn_op.h"
#ifdef CLADA_ORT_CUDA
#include "cuda_op.h"
#endif

#define CLADA_EXPORT extern "C" __attribute__((visibility("default")))

CLADA_EXPORT int clada_op_version(void) { return clada::kOpVersion; }

CLADA_EXPORT const char* clada_build_info(void) {
  static const std::string info = std::string("clada ") + CLADA_VERSION + ", " + clada::kDomain + "::" + clada::kOpName + " " +
                                  clada::kOpVersionText + ", ONNX Runtime API " +
                                  std::to_string(clada::ort::kApiVersion) + ", compiler " + __VERSION__ +
#ifdef CLADA_ORT_CUDA
                                  ", CUDA " + clada::ort::CudaVersion() +
#endif
                                  ", instruction set " +
                                  clada::KernelsName(clada::FindKernels(nullptr));
  return info.c_str();
}

namespace {

// ONNX Runtime's own kernels copy their weights unless this is 1, and ours do as they do. It has to be set before the library is
// registered.
constexpr char kDisablePrepacking[] = "session.disable_prepacking";

struct Ops {
  explicit Ops(clada::ort::WeightMemory weights) : op(weights), quant_op(weights), domain(clada::kDomain) {
#ifdef CLADA_ORT_CUDA
    domain.Add(&cuda_op);
    domain.Add(&quant_cuda_op);
#endif
#ifndef CLADA_CUDA_EMULATION  // there the emulated ops take the CPU's place
    domain.Add(&op);
    domain.Add(&quant_op);
#endif
  }

  clada::ort::SparseFFNOp op;
  clada::ort::QuantMatMulOp quant_op;
#ifdef CLADA_ORT_CUDA
  clada::ort::SparseFFNCudaOp cuda_op;
  clada::ort::QuantMatMulCudaOp quant_cuda_op;
#endif
  Ort::CustomOpDomain domain;
};

}  // namespace

CLADA_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(clada::ort::kApiVersion);
  if (api == nullptr) {
    const std::string message = "this library of com.clada needs ONNX Runtime 1." + std::to_string(clada::ort::kApiVersion) +
                                " or newer; this is " + base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, message.c_str());
  }
  Ort::InitApi(api);
  try {
    // Sessions keep pointers to all of them, so they live as long as the library.
    static const Ops own(clada::ort::WeightMemory::kOwn), in_place(clada::ort::WeightMemory::kInPlace);
    Ort::UnownedSessionOptions session(options);
    const bool packs = Ort::ConstSessionOptions(options).GetConfigEntryOrDefault(kDisablePrepacking, "0") != "1";
    session.Add((packs ? own : in_place).domain);
    return nullptr;
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return api->CreateStatus(ORT_FAIL, "com.clada: an unknown exception");
  }
}
