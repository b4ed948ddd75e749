// SPDX-License-Identifier: Apache-2.0
// The TensorRT shell of com.clada::SparseFFN: turns TensorRT's tensors into a clada::Problem for the CUDA kernels.
//
// One build serves TensorRT 10, TensorRT 11 and TensorRT-RTX: only interfaces that are the same in all of them are used. Nothing
// here calls the plugin registry or the resource context, whose virtual tables differ between these.
#ifndef CLADA_TRT_PLUGIN_H_
#define CLADA_TRT_PLUGIN_H_

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "clada/contract.h"
#include "clada/sparse_ffn_cuda.h"
#include "fields.h"

namespace clada::trt {

// An execution context has a clone of its own and calls it from one thread at a time.
class SparseFFNPlugin final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuild,
                              public nvinfer1::IPluginV3OneRuntime {
 public:
  SparseFFNPlugin(const std::string& node, const Attributes& attributes);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return kOpName; }
  const char* getPluginVersion() const noexcept override { return kOpVersionText; }
  const char* getPluginNamespace() const noexcept override { return kDomain; }

  int32_t getNbOutputs() const noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t outputs, const nvinfer1::DataType* input_types,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* input_shapes, int32_t inputs, const nvinfer1::DimsExprs* shape_inputs,
                          int32_t shape_input_count, nvinfer1::DimsExprs* output_shapes, int32_t outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) const noexcept override;
  // There are no custom tactics: the kernels choose by shape, and the same inputs must give the same bits in every engine.
  const char* getTimingCacheID() noexcept override { return text_.c_str(); }
  const char* getMetadataString() noexcept override { return text_.c_str(); }
  int32_t getFormatCombinationLimit() noexcept override;

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc* out,
                        int32_t outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return fields_.Collection(); }

 private:
  void WantCounts(int32_t inputs, int32_t outputs) const;
  void Prepare(const nvinfer1::PluginTensorDesc* in);
  bool Prepared(const nvinfer1::PluginTensorDesc* in) const;

  const std::string node_;
  const Attributes attributes_;
  const std::vector<Input> inputs_;
  const std::vector<Output> outputs_;
  std::string text_;
  Fields fields_;

  // The shapes and types of the last call, and what follows from them.
  std::vector<nvinfer1::PluginTensorDesc> prepared_;
  Problem problem_;
  cuda::Gemm gemm_;
  size_t workspace_bytes_ = 0;
};

}  // namespace clada::trt

#endif  // CLADA_TRT_PLUGIN_H_
