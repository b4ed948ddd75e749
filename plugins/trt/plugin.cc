// SPDX-License-Identifier: Apache-2.0
#include "plugin.h"

#include <algorithm>
#include <memory>

#include "log.h"

namespace clada::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr size_t kAlignment = 256;  // of the kernels' workspace
// For the library's GEMM, whichever version of it is found at run time. Layers share the workspace, so an engine has it once.
constexpr size_t kGemmWorkspaceBytes = size_t{32} << 20;

ElementType ToElementType(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return ElementType::kFloat32;
    case DataType::kHALF: return ElementType::kFloat16;
    case DataType::kBF16: return ElementType::kBFloat16;
    case DataType::kINT8: return ElementType::kInt8;
    case DataType::kUINT8: return ElementType::kUint8;
    case DataType::kINT32: return ElementType::kInt32;
    default: return ElementType::kOther;
  }
}

std::string TypeName(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kINT8: return "int8";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    case DataType::kBOOL: return "bool";
    case DataType::kUINT8: return "uint8";
    default: return "TensorRT type " + std::to_string(static_cast<int32_t>(type));
  }
}

// The type of an output that has always the same.
DataType ToDataType(ElementType type) {
  switch (type) {
    case ElementType::kFloat16: return DataType::kHALF;
    case ElementType::kBFloat16: return DataType::kBF16;
    case ElementType::kInt8: return DataType::kINT8;
    case ElementType::kUint8: return DataType::kUINT8;
    case ElementType::kInt32: return DataType::kINT32;
    default: return DataType::kFLOAT;
  }
}

DataType OutputType(Output output, DataType x) {
  const TensorInfo& info = Info(output);
  return info.rule == TypeRule::kFixed ? ToDataType(info.type) : x;
}

std::string InputText(const std::string& node, Input input) {
  return "SparseFFN node '" + node + "': input '" + Info(input).name + "'";
}

TensorView View(DataType type, const Dims& dims, const void* data = nullptr) {
  TensorView view;
  view.type = ToElementType(type);
  view.type_name = TypeName(type);
  // -1 where a size is open.
  for (int32_t i = 0; i < dims.nbDims; ++i) view.shape.push_back(std::max<int64_t>(dims.d[i], -1));
  view.data = data;
  return view;
}

// The largest call of a profile. TensorRT bounds each input on its own, and may bound two that are always of the same size
// differently; where a size is open, the one that x has is taken.
std::vector<TensorView> Largest(const std::vector<Input>& inputs, const DynamicPluginTensorDesc* in) {
  std::vector<TensorView> views;
  for (size_t i = 0; i < inputs.size(); ++i) {
    views.push_back(View(in[i].desc.type, in[i].max));
    for (int64_t& size : views.back().shape) size = std::max<int64_t>(size, 0);
  }
  const std::vector<int64_t>& x = views[0].shape;
  for (size_t i = 1; i < inputs.size(); ++i) {
    const Size first = Info(inputs[i]).shapes[0].axes[0].size;
    const bool by_row = first == Size::kRows;
    if (!by_row && first != Size::kB) continue;
    std::vector<int64_t>& shape = views[i].shape;
    const size_t shared = std::min({shape.size(), x.size() - !x.empty(), by_row ? x.size() : 1});
    for (size_t axis = 0; axis < shared; ++axis)
      if (in[i].desc.dims.d[axis] < 0) shape[axis] = x[axis];
  }
  return views;
}

bool SameTensor(const PluginTensorDesc& a, const PluginTensorDesc& b) {
  return a.type == b.type && a.dims.nbDims == b.dims.nbDims && std::equal(a.dims.d, a.dims.d + a.dims.nbDims, b.dims.d);
}

void CheckSizes(const std::string& node, const Problem& problem) {
  const std::string error = cuda::CheckLimits(problem);
  if (!error.empty()) throw ContractError("SparseFFN node '" + node + "': " + error);
}

// Enough with a library's GEMM and without: an engine may run where another one is found than where it was built.
size_t WorkspaceFor(const Problem& problem) {
  cuda::Gemm library, own;
  library.workspace_bytes = kGemmWorkspaceBytes;
  library.run = [](void*, CUstream_st*, bool, int64_t, int64_t, int64_t, FloatType, const void*, const void*, float*, void*,
                   size_t) { return std::string(); };
  const size_t bytes = std::max(cuda::WorkspaceBytes(problem, library), cuda::WorkspaceBytes(problem, own));
  return bytes ? bytes + kAlignment - 1 : 0;
}

// Runs a body that may throw; what it throws is logged, and becomes a failure's return value.
template <class Result, class Body>
Result Guard(Result failure, Body body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    LogError(error.what());
  } catch (...) {
    LogError("SparseFFN: an unknown exception");
  }
  return failure;
}

constexpr int32_t kOk = 0, kFailed = 1;

}  // namespace

SparseFFNPlugin::SparseFFNPlugin(const std::string& node, const Attributes& attributes)
    : node_(node), attributes_(attributes), inputs_(Inputs(attributes)), outputs_(Outputs(attributes)) {
  WriteAttributes(attributes_, fields_);
  text_ = fields_.Text();
  fields_.String(kNodeField, node_.c_str());
  fields_.String(kVersionField, CLADA_VERSION);
}

nvinfer1::IPluginCapability* SparseFFNPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* SparseFFNPlugin::clone() noexcept {
  return Guard<nvinfer1::IPluginV3*>(nullptr, [&] { return new SparseFFNPlugin(node_, attributes_); });
}

// The kernels keep no state between calls and the workspace comes with each, so a context has nothing to lend.
nvinfer1::IPluginV3* SparseFFNPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

int32_t SparseFFNPlugin::getNbOutputs() const noexcept { return static_cast<int32_t>(outputs_.size()); }

void SparseFFNPlugin::WantCounts(int32_t inputs, int32_t outputs) const {
  CheckCounts(node_, attributes_, static_cast<size_t>(inputs), static_cast<size_t>(outputs));
}

int32_t SparseFFNPlugin::getOutputDataTypes(DataType* output_types, int32_t outputs, const DataType* input_types,
                                            int32_t inputs) const noexcept {
  return Guard(kFailed, [&] {
    WantCounts(inputs, outputs);
    const ElementType x = ToElementType(input_types[0]), w_in = ToElementType(input_types[2]);
    for (int32_t i = 0; i < inputs; ++i) {
      if (Allowed(attributes_, inputs_[i], ToElementType(input_types[i]), x, w_in)) continue;
      std::string wanted;
      for (int type = 0; type < static_cast<int>(ElementType::kOther); ++type)
        if (Allowed(attributes_, inputs_[i], static_cast<ElementType>(type), x, w_in))
          wanted += (wanted.empty() ? "" : " or ") + std::string(kElementTypeNames[type]);
      throw ContractError(InputText(node_, inputs_[i]) + " has type " + TypeName(input_types[i]) + "; wanted " + wanted);
    }
    for (int32_t i = 0; i < outputs; ++i) output_types[i] = OutputType(outputs_[i], input_types[0]);
    return kOk;
  });
}

int32_t SparseFFNPlugin::getOutputShapes(const nvinfer1::DimsExprs* input_shapes, int32_t inputs, const nvinfer1::DimsExprs*,
                                         int32_t, nvinfer1::DimsExprs* output_shapes, int32_t outputs,
                                         nvinfer1::IExprBuilder&) noexcept {
  return Guard(kFailed, [&] {
    WantCounts(inputs, outputs);
    const nvinfer1::DimsExprs &x = input_shapes[0], &w_in = input_shapes[2];
    const auto wrong_rank = [&](Input input, const nvinfer1::DimsExprs& shape, const char* wanted) {
      throw ContractError(InputText(node_, input) + " has rank " + std::to_string(shape.nbDims) + "; wanted " + wanted);
    };
    if (x.nbDims < 1) wrong_rank(Input::kX, x, "at least 1");
    if (w_in.nbDims != 3) wrong_rank(Input::kWIn, w_in, "3: [f, n, d]");
    for (int32_t i = 0; i < outputs; ++i) {
      nvinfer1::DimsExprs& made = output_shapes[i];
      made.nbDims = 0;
      const auto add = [&](const nvinfer1::IDimensionExpr* size) { made.d[made.nbDims++] = size; };
      const TensorShape& shape = Info(outputs_[i]).shapes[0];
      for (int axis = 0; axis < shape.rank; ++axis) {
        const Size size = shape.axes[axis].size;
        if (size == Size::kB && x.nbDims != 3) wrong_rank(Input::kX, x, "3 for the prompt statistic: [B, S, d]");
        if (size == Size::kRows)
          for (int32_t k = 0; k + 1 < x.nbDims; ++k) add(x.d[k]);
        else
          add(size == Size::kB ? x.d[0] : size == Size::kF ? w_in.d[0] : x.d[x.nbDims - 1]);
      }
    }
    return kOk;
  });
}

bool SparseFFNPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                                int32_t outputs) noexcept {
  return Guard(false, [&] {
    WantCounts(inputs, outputs);
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    const DataType x = tensors[0].desc.type;
    if (position >= inputs) return tensor.type == OutputType(outputs_[position - inputs], x);
    // Only tensors up to `position` may be looked at.
    const DataType w_in = position > 2 ? tensors[2].desc.type : DataType::kFLOAT;
    return Allowed(attributes_, inputs_[position], ToElementType(tensor.type), ToElementType(x), ToElementType(w_in));
  });
}

// x is float32 with weights of three types, or has the weights' type, of 16 bits.
int32_t SparseFFNPlugin::getFormatCombinationLimit() noexcept { return 5; }

int32_t SparseFFNPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                                         int32_t outputs) noexcept {
  return Guard(kFailed, [&] {
    WantCounts(inputs, outputs);
    CheckSizes(node_, MakeProblem(node_, attributes_, Largest(inputs_, in), false));
    return kOk;
  });
}

size_t SparseFFNPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                                         int32_t outputs) const noexcept {
  return Guard(size_t{0}, [&] {
    WantCounts(inputs, outputs);
    return WorkspaceFor(MakeProblem(node_, attributes_, Largest(inputs_, in), false));
  });
}

bool SparseFFNPlugin::Prepared(const PluginTensorDesc* in) const {
  return !prepared_.empty() && std::equal(prepared_.begin(), prepared_.end(), in, SameTensor);
}

void SparseFFNPlugin::Prepare(const PluginTensorDesc* in) {
  prepared_.clear();
  std::vector<TensorView> views;
  for (size_t i = 0; i < inputs_.size(); ++i) views.push_back(View(in[i].type, in[i].dims));
  // The threshold's values are in device memory; the exporter has checked them.
  problem_ = MakeProblem(node_, attributes_, views, false);
  CheckSizes(node_, problem_);
  gemm_ = cuda::DefaultGemm();
  if (gemm_.run) gemm_.workspace_bytes = kGemmWorkspaceBytes;
  workspace_bytes_ = cuda::WorkspaceBytes(problem_, gemm_);
  prepared_.assign(in, in + inputs_.size());
}

int32_t SparseFFNPlugin::onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc*,
                                       int32_t outputs) noexcept {
  return Guard(kFailed, [&] {
    WantCounts(inputs, outputs);
    Prepare(in);
    return kOk;
  });
}

int32_t SparseFFNPlugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                                 void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return Guard(kFailed, [&] {
    if (!Prepared(in)) Prepare(in);
    for (size_t i = 0; i < inputs_.size(); ++i) SetInput(problem_, inputs_[i], inputs[i]);
    for (size_t i = 0; i < outputs_.size(); ++i) SetOutput(problem_, outputs_[i], outputs[i]);
    if (workspace == nullptr && workspace_bytes_ > 0)
      throw ContractError("SparseFFN node '" + node_ + "': needs a workspace of " + std::to_string(workspace_bytes_) +
                          " bytes and was given none");
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(workspace) + kAlignment - 1) / kAlignment * kAlignment;
    const std::string error = cuda::RunSparseFFN(problem_, gemm_, reinterpret_cast<void*>(aligned), stream);
    if (!error.empty()) throw ContractError("SparseFFN node '" + node_ + "': " + error);
    return kOk;
  });
}

}  // namespace clada::trt
