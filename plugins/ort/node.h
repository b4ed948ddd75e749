// SPDX-License-Identifier: Apache-2.0
// What the kernels of all execution providers do alike: read a node, and turn a call's tensors into a clada::Problem.
#ifndef CLADA_ORT_NODE_H_
#define CLADA_ORT_NODE_H_

#include <exception>
#include <new>
#include <string>
#include <type_traits>

#include "sparse_ffn_op.h"

namespace clada::ort {

// A node's attributes; `op` names it in messages.
class NodeAttributes final : public AttributeReader {
 public:
  NodeAttributes(const char* op, const std::string& node, const OrtKernelInfo* info) : op_(op), node_(node), info_(info) {}
  bool Int(const char* name, int64_t* value) const override;
  bool Float(const char* name, float* value) const override;
  bool String(const char* name, std::string* value) const override;

 private:
  bool Has(const char* name, const char* wanted, bool found) const;

  const char* op_;
  const std::string& node_;
  const OrtKernelInfo* info_;
};

// Throws ContractError: CLADA_ISA names an instruction set that is unknown or that the machine lacks.
[[noreturn]] void RefuseInstructionSet(const char* op, const std::string& node);

// The runtime's threads, for the time of a call.
ParallelFor HostThreads(OrtKernelContext* context);

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

// Runs a body that may throw, and turns what it throws, whatever it is, into a status: nothing may pass the
// runtime's C interface. `Body` returns nothing, or a status.
template <class Body>
OrtStatusPtr Guard(Body body) noexcept {
  try {
    if constexpr (std::is_void_v<decltype(body())>) {
      body();
      return nullptr;
    } else {
      return body();
    }
  } catch (const ContractError& error) {
    return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, "com.clada: out of memory");
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, "com.clada: an unknown exception");
  }
}

}  // namespace clada::ort

#endif  // CLADA_ORT_NODE_H_
