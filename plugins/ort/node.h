// SPDX-License-Identifier: Apache-2.0
// What the kernels of all execution providers do alike: read a node, and turn a call's tensors into a clada::Problem.
#ifndef CLADA_ORT_NODE_H_
#define CLADA_ORT_NODE_H_

#include <exception>
#include <string>

#include "sparse_ffn_op.h"

namespace clada::ort {

// Reads and checks the node's attributes, and its numbers of inputs and outputs.
Attributes ReadNode(const std::string& node, const OrtKernelInfo* info);

TensorView View(Ort::ConstValue value);

// Checks the inputs and allocates the outputs.
Problem Bind(const std::string& node, const Attributes& attributes, Ort::KernelContext& context, bool check_threshold);

// Memory from ORT's arena, so that all layers share it.
class Scratch {
 public:
  Scratch(const OrtKernelContext* context, const OrtMemoryInfo* memory, size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  // The first address of that alignment, which `bytes` must have room for.
  void* Aligned(size_t alignment) const {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(data_) + alignment - 1) / alignment * alignment);
  }

 private:
  OrtAllocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

// Runs a body that may throw, and turns what it throws into a status.
template <class Body>
OrtStatusPtr Guard(Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const ContractError& error) {
    return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  }
}

}  // namespace clada::ort

#endif  // CLADA_ORT_NODE_H_
