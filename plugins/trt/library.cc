// SPDX-License-Identifier: Apache-2.0
// What the library exports. IPluginRegistry::loadLibrary asks for the first two.
#include <cuda_runtime_api.h>

#include <string>

#include "creator.h"
#include "log.h"

#define CLADA_EXPORT extern "C" __attribute__((visibility("default")))

CLADA_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept {
  // Never destroyed: TensorRT's registry may outlive this library's static objects.
  static nvinfer1::IPluginCreatorInterface* const creators[] = {new clada::trt::SparseFFNCreator};
  count = 1;
  return creators;
}

CLADA_EXPORT void setLoggerFinder(void* finder) noexcept { clada::trt::SetLoggerFinder(finder); }

CLADA_EXPORT int clada_op_version(void) { return clada::kOpVersion; }

CLADA_EXPORT const char* clada_build_info(void) {
  static const std::string info =
      std::string("clada ") + CLADA_VERSION + ", " + clada::kDomain + "::" + clada::kOpName + " " + clada::kOpVersionText +
      ", TensorRT headers " + std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + ", CUDA " +
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) + ", compiler " + __VERSION__;
  return info.c_str();
}
