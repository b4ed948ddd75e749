// SPDX-License-Identifier: Apache-2.0
#include "sparse_ffn_op.h"

#include <cstdlib>
#include <new>

#include "shape_inference.h"

namespace clada::ort {
namespace {

class NodeAttributes final : public AttributeReader {
 public:
  NodeAttributes(const std::string& node, const OrtKernelInfo* info) : node_(node), info_(info) {}

  bool Int(const char* name, int64_t* value) const override {
    return Has(name, "an int", Status(Ort::GetApi().KernelInfoGetAttribute_int64(info_, name, value)));
  }
  bool Float(const char* name, float* value) const override {
    float found;
    if (!Has(name, "a float", Status(Ort::GetApi().KernelInfoGetAttribute_float(info_, name, &found)))) return false;
    *value = found;
    return true;
  }
  bool String(const char* name, std::string* value) const override {
    size_t size = 0;
    if (!Has(name, "a string", Status(Ort::GetApi().KernelInfoGetAttribute_string(info_, name, nullptr, &size)))) return false;
    std::string found(size, '\0');
    Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAttribute_string(info_, name, found.data(), &size));
    found.resize(size ? size - 1 : 0);
    *value = found;
    return true;
  }

 private:
  static bool Status(OrtStatus* status) { return Ort::Status(status).IsOK(); }

  // A failed read means that the attribute is absent, or has another type: the latter must not pass for the default.
  bool Has(const char* name, const char* wanted, bool found) const {
    if (found) return true;
    int64_t number;
    float real;
    size_t size = 0;
    const char* other = nullptr;
    if (Status(Ort::GetApi().KernelInfoGetAttribute_int64(info_, name, &number))) other = "an int";
    else if (Status(Ort::GetApi().KernelInfoGetAttribute_float(info_, name, &real))) other = "a float";
    else if (Status(Ort::GetApi().KernelInfoGetAttribute_string(info_, name, nullptr, &size))) other = "a string";
    else if (Status(Ort::GetApi().KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size))) other = "a list of ints";
    else if (Status(Ort::GetApi().KernelInfoGetAttributeArray_float(info_, name, nullptr, &size))) other = "a list of floats";
    if (other)
      throw ContractError("SparseFFN node '" + node_ + "': attribute '" + name + "' is " + other + "; wanted " + wanted);
    return false;
  }

  const std::string& node_;
  const OrtKernelInfo* info_;
};

TensorView View(Ort::ConstValue value) {
  const Ort::TensorTypeAndShapeInfo info = value.GetTensorTypeAndShapeInfo();
  TensorView view;
  view.type = ToElementType(info.GetElementType());
  view.type_name = "ONNX type " + std::to_string(info.GetElementType());
  view.shape = info.GetShape();
  view.data = value.GetTensorRawData();
  return view;
}

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

// Memory from ORT's arena, so that all layers share it.
class Scratch {
 public:
  Scratch(const OrtKernelContext* context, const OrtMemoryInfo* memory, size_t bytes) {
    Ort::ThrowOnError(Ort::GetApi().KernelContext_GetAllocator(context, memory, &allocator_));
    data_ = allocator_->Alloc(allocator_, bytes);
    if (data_ == nullptr) {
      Ort::GetApi().ReleaseAllocator(allocator_);
      throw std::bad_alloc();
    }
  }
  ~Scratch() {
    allocator_->Free(allocator_, data_);
    Ort::GetApi().ReleaseAllocator(allocator_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  OrtAllocator* allocator_ = nullptr;
  void* data_ = nullptr;
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

OrtStatusPtr Refuse(OrtErrorCode code, const char* what) noexcept { return Ort::GetApi().CreateStatus(code, what); }

}  // namespace

SparseFFNKernel::SparseFFNKernel(const OrtKernelInfo* raw)
    : node_(Ort::ConstKernelInfo(raw).GetNodeName()),
      memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)) {
  const Ort::ConstKernelInfo info(raw);
  attributes_ = ReadAttributes(node_, NodeAttributes(node_, raw));
  kernels_ = ChooseKernels(node_);
  const std::vector<Input> inputs = Inputs(attributes_);
  if (info.GetInputCount() != inputs.size()) {
    std::string names;
    for (const Input input : inputs) names += (names.empty() ? "" : ", ") + std::string(InputName(input));
    throw ContractError("SparseFFN node '" + node_ + "': has " + std::to_string(info.GetInputCount()) +
                        " inputs; its attributes want " + std::to_string(inputs.size()) + ": " + names);
  }
  const size_t outputs = 1 + attributes_.emit_stat + attributes_.emit_active;
  if (info.GetOutputCount() != outputs)
    throw ContractError("SparseFFN node '" + node_ + "': has " + std::to_string(info.GetOutputCount()) +
                        " outputs; its attributes want " + std::to_string(outputs));
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
  std::vector<TensorView> views;
  views.reserve(context.GetInputCount());
  for (size_t i = 0; i < context.GetInputCount(); ++i) {
    const Ort::ConstValue value = context.GetInput(i);
    if (!value)
      throw ContractError("SparseFFN node '" + node_ + "': input " + std::to_string(i) + " ('" +
                          InputName(Inputs(attributes_).at(i)) + "') is not connected; no input is optional");
    views.push_back(View(value));
  }
  Problem problem = MakeProblem(node_, attributes_, views, !threshold_checked_);

  const std::vector<int64_t>& shape = views[0].shape;
  problem.y = context.GetOutput(0, shape).GetTensorMutableRawData();
  size_t output = 1;
  if (attributes_.emit_stat)
    problem.stat = context.GetOutput(output++, {problem.batch, problem.intermediate_size}).GetTensorMutableData<float>();
  if (attributes_.emit_active)
    problem.active =
        context.GetOutput(output, std::vector<int64_t>(shape.begin(), shape.end() - 1)).GetTensorMutableData<int32_t>();

  GemmHost gemm{raw, &memory_, &gemm_, &gemm_transposed_};
  Host host;
  host.parallel_for.host = raw;
  host.parallel_for.run = [](void* at, size_t count, ParallelBody body, void* user) {
    Ort::KernelContext(static_cast<OrtKernelContext*>(at)).ParallelFor(body, count, 0, user);
  };
  host.gemm.run = &GemmHost::Run;
  host.gemm.host = &gemm;
  host.kernels = kernels_;

  const size_t bytes = ScratchBytes(problem) + 64;
  const Scratch scratch(raw, memory_, bytes);
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64;
  RunSparseFFN(problem, host, reinterpret_cast<void*>(aligned));
}

OrtStatusPtr SparseFFNKernel::ComputeV2(OrtKernelContext* context) noexcept {
  try {
    Compute(context);
    return nullptr;
  } catch (const ContractError& error) {
    return Refuse(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return Refuse(ORT_FAIL, error.what());
  }
}

SparseFFNOp::SparseFFNOp() {
  OrtCustomOp::version = kApiVersion;
  OrtCustomOp::InferOutputShapeFn = &InferShapes;
}

OrtStatusPtr SparseFFNOp::CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
  try {
    *kernel = new SparseFFNKernel(info);
    return nullptr;
  } catch (const ContractError& error) {
    return Refuse(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return Refuse(ORT_FAIL, error.what());
  }
}

}  // namespace clada::ort
