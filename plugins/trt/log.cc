// SPDX-License-Identifier: Apache-2.0
#include "log.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <typeinfo>

namespace clada::trt {
namespace {

// ILoggerFinder and ILogger are the two interfaces here that differ: TensorRT 11 and TensorRT-RTX derive them from
// IVersionedInterface, whose virtual functions come first, and TensorRT 10 does not. A call through the headers that this was built
// with would reach another function, which returns or does nothing. So the object is asked what it is (the ABI of C++ on Linux puts
// its type before its table of virtual functions), and the function is called by its place in the table.
constexpr int kOwnFirst = 0;
constexpr int kAfterVersioned = 4;  // getAPILanguage, getInterfaceInfo, two destructors

void* const* Table(const void* object) { return *static_cast<void* const* const*>(object); }

bool DerivesFrom(const std::type_info* type, const char* name) {
  if (type == nullptr) return false;
  if (std::strcmp(type->name(), name) == 0) return true;
  if (const auto* single = dynamic_cast<const abi::__si_class_type_info*>(type)) return DerivesFrom(single->__base_type, name);
  if (const auto* several = dynamic_cast<const abi::__vmi_class_type_info*>(type))
    for (unsigned i = 0; i < several->__base_count; ++i)
      if (DerivesFrom(several->__base_info[i].__base_type, name)) return true;
  return false;
}

bool IsA(const void* object, const char* name) {
  return DerivesFrom(static_cast<const std::type_info*>(Table(object)[-1]), name);
}

// While a network is parsed and built, the finder of TensorRT-RTX knows no logger. TensorRT's C function getLogger() does, but nothing
// of TensorRT is linked here; the finder's code lies in the library that is calling.
void* GlobalLogger(const void* code) {
  Dl_info library;
  if (dladdr(code, &library) == 0 || library.dli_fname == nullptr) return nullptr;
  void* const handle = dlopen(library.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return nullptr;
  const auto get_logger = reinterpret_cast<void* (*)()>(dlsym(handle, "getLogger"));
  void* const logger = get_logger ? get_logger() : nullptr;
  dlclose(handle);
  return logger;
}

std::atomic<void*> logger_finder{nullptr};

bool Log(const char* text) {
  void* const finder = logger_finder;
  if (finder == nullptr) return false;
  const bool versioned_finder = IsA(finder, "N8nvinfer117IVersionedInterfaceE");
  using FindLogger = void* (*)(void* self);
  void* const find_logger = Table(finder)[versioned_finder ? kAfterVersioned : kOwnFirst];
  void* logger = reinterpret_cast<FindLogger>(find_logger)(finder);
  if (logger == nullptr) logger = GlobalLogger(find_logger);
  if (logger == nullptr) return false;
  // An application's logger may be compiled without types; then it is taken to be of the finder's age.
  const bool versioned_logger = IsA(logger, "N8nvinfer15v_1_07ILoggerE") ||
                                (versioned_finder && !IsA(logger, "N8nvinfer17ILoggerE"));
  using LogMessage = void (*)(void* self, int32_t severity, const char* text);
  const auto log = reinterpret_cast<LogMessage>(Table(logger)[versioned_logger ? kAfterVersioned : kOwnFirst]);
  log(logger, static_cast<int32_t>(nvinfer1::ILogger::Severity::kERROR), text);
  return true;
}

}  // namespace

void SetLoggerFinder(void* finder) noexcept { logger_finder = finder; }

void LogError(const std::string& text) noexcept {
  try {
    if (Log(("clada: " + text).c_str())) return;
  } catch (...) {  // from an application's logger; the message still reaches someone
  }
  std::fprintf(stderr, "clada: %s\n", text.c_str());
}

}  // namespace clada::trt
