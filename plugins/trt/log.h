// SPDX-License-Identifier: Apache-2.0
#ifndef CLADA_TRT_LOG_H_
#define CLADA_TRT_LOG_H_

#include <NvInferRuntime.h>

#include <string>

namespace clada::trt {

// An ILoggerFinder of whatever TensorRT has loaded us.
void SetLoggerFinder(void* finder) noexcept;

// To the logger of the builder, engine or context that is calling us; to stderr when TensorRT has not said how to find it.
void LogError(const std::string& text) noexcept;

}  // namespace clada::trt

#endif  // CLADA_TRT_LOG_H_
