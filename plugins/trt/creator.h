// SPDX-License-Identifier: Apache-2.0
#ifndef CLADA_TRT_CREATOR_H_
#define CLADA_TRT_CREATOR_H_

#include "plugin.h"

namespace clada::trt {

// Makes plugins from a node's attributes, and from what an engine kept of them.
class SparseFFNCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  SparseFFNCreator();

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return fields_.Collection(); }
  const char* getPluginName() const noexcept override { return kOpName; }
  const char* getPluginVersion() const noexcept override { return kOpVersionText; }
  const char* getPluginNamespace() const noexcept override { return kDomain; }

 private:
  Fields fields_;
};

}  // namespace clada::trt

#endif  // CLADA_TRT_CREATOR_H_
