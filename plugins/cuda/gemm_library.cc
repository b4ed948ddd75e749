// SPDX-License-Identifier: Apache-2.0
// cuBLASLt, opened at run time: the library is half a gigabyte, comes with CUDA and with every framework, and the plugin must
// load without it. Its C interface is declared here as far as it is called; where its header is at hand, the declarations are
// compared with it.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <library_types.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

#include "kernels.h"

#if defined(__has_include)
#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
#define CLADA_HAS_CUBLASLT_HEADER 1
#endif
#endif

namespace clada::cuda {
namespace {

constexpr int kSuccess = 0, kCompute32F = 68, kTransposed = 1;
constexpr int kTransA = 3;  // of a product's description
constexpr int kMaxWorkspace = 1, kAlignmentA = 5, kAlignmentB = 6, kAlignmentC = 7, kAlignmentD = 8;  // of a preference

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

#ifdef CLADA_HAS_CUBLASLT_HEADER
static_assert(kSuccess == CUBLAS_STATUS_SUCCESS && kCompute32F == CUBLAS_COMPUTE_32F && kTransposed == CUBLAS_OP_T);
static_assert(kTransA == CUBLASLT_MATMUL_DESC_TRANSA && kMaxWorkspace == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
static_assert(kAlignmentA == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES && kAlignmentB == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
static_assert(kAlignmentC == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES && kAlignmentD == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
static_assert(sizeof(Algorithm) == sizeof(cublasLtMatmulAlgo_t) && sizeof(Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t));
#endif

using Handle = void*;

struct Library {
  int (*Create)(Handle*) = nullptr;
  size_t (*GetVersion)() = nullptr;
  const char* (*GetStatusString)(int) = nullptr;
  int (*MatmulDescCreate)(void**, int compute, int scale) = nullptr;
  int (*MatmulDescSetAttribute)(void*, int, const void*, size_t) = nullptr;
  int (*MatmulDescDestroy)(void*) = nullptr;
  int (*MatrixLayoutCreate)(void**, int type, uint64_t rows, uint64_t columns, int64_t stride) = nullptr;
  int (*MatrixLayoutDestroy)(void*) = nullptr;
  int (*MatmulPreferenceCreate)(void**) = nullptr;
  int (*MatmulPreferenceSetAttribute)(void*, int, const void*, size_t) = nullptr;
  int (*MatmulPreferenceDestroy)(void*) = nullptr;
  int (*MatmulAlgoGetHeuristic)(Handle, void*, void*, void*, void*, void*, void*, int, Heuristic*, int*) = nullptr;
  int (*Matmul)(Handle, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
                const Algorithm*, void*, size_t, cudaStream_t) = nullptr;
  std::string name;  // of the file; empty when it could not be opened
  std::string why;
};

template <class F>
void Find(void* file, const char* name, F* function, bool* complete) {
  *function = reinterpret_cast<F>(dlsym(file, name));
  *complete = *complete && *function != nullptr;
}

Library Open() {
  Library library;
#ifdef CLADA_CUDA_EMULATION
  library.why = "CUDA is emulated";
  return library;
#endif
  const char* wanted = std::getenv("CLADA_CUBLASLT");
  if (wanted && std::strcmp(wanted, "off") == 0) {
    library.why = "CLADA_CUBLASLT is off";
    return library;
  }
  for (const char* name : {wanted, "libcublasLt.so.13", "libcublasLt.so.12"}) {
    if (name == nullptr || *name == 0) continue;
    void* file = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (file == nullptr) {
      library.why += (library.why.empty() ? "" : "; ") + std::string(name) + " can't be opened";
      continue;
    }
    bool complete = true;
    Find(file, "cublasLtCreate", &library.Create, &complete);
    Find(file, "cublasLtGetVersion", &library.GetVersion, &complete);
    Find(file, "cublasLtGetStatusString", &library.GetStatusString, &complete);
    Find(file, "cublasLtMatmulDescCreate", &library.MatmulDescCreate, &complete);
    Find(file, "cublasLtMatmulDescSetAttribute", &library.MatmulDescSetAttribute, &complete);
    Find(file, "cublasLtMatmulDescDestroy", &library.MatmulDescDestroy, &complete);
    Find(file, "cublasLtMatrixLayoutCreate", &library.MatrixLayoutCreate, &complete);
    Find(file, "cublasLtMatrixLayoutDestroy", &library.MatrixLayoutDestroy, &complete);
    Find(file, "cublasLtMatmulPreferenceCreate", &library.MatmulPreferenceCreate, &complete);
    Find(file, "cublasLtMatmulPreferenceSetAttribute", &library.MatmulPreferenceSetAttribute, &complete);
    Find(file, "cublasLtMatmulPreferenceDestroy", &library.MatmulPreferenceDestroy, &complete);
    Find(file, "cublasLtMatmulAlgoGetHeuristic", &library.MatmulAlgoGetHeuristic, &complete);
    Find(file, "cublasLtMatmul", &library.Matmul, &complete);
    if (complete) {
      library.name = name;
      return library;
    }
    library.why += (library.why.empty() ? "" : "; ") + std::string(name) + " lacks a function";
  }
  return library;
}

// What one product needs: created for a shape, kept for the next time.
struct Product {
  void* desc = nullptr;
  void* a = nullptr;
  void* b = nullptr;
  void* c = nullptr;
  Heuristic choice = {};
  bool found = false;
};

class LibraryGemm {
 public:
  explicit LibraryGemm(const Library& library) : library_(library) {}

  std::string Run(cudaStream_t stream, bool transpose_b, int64_t m, int64_t n, int64_t k, FloatType type, const void* a,
                  const void* b, float* c, void* workspace, size_t workspace_bytes) {
    // Handles belong to a device; algorithms are chosen once a shape. The lock is held over the launch: products are shared.
    const std::lock_guard<std::mutex> lock(mutex_);
    int device = 0;
    if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return cudaGetErrorName(status);
    Handle& handle = handles_[device];
    if (handle == nullptr)
      if (const int status = library_.Create(&handle)) return Text("cublasLtCreate", status);
    const Key key{device, transpose_b, m, n, k, static_cast<int>(type), Alignment(a), Alignment(b), Alignment(c)};
    auto at = products_.find(key);
    if (at == products_.end()) {
      if (products_.size() >= kMostProducts) Clear();
      at = products_.emplace(key, Product()).first;
      if (const std::string error = Choose(handle, key, workspace_bytes, &at->second); !error.empty()) {
        Destroy(&at->second);
        products_.erase(at);
        return error;
      }
    }
    const Product& product = at->second;
    if (!product.found) {
      const cudaError_t status = LaunchGemm(transpose_b, m, n, k, type, a, b, c, stream);
      return status == cudaSuccess ? std::string() : cudaGetErrorName(status);
    }
    const float one = 1.0f, zero = 0.0f;
    const int status = library_.Matmul(handle, product.desc, &one, b, product.a, a, product.b, &zero, c, product.c, c, product.c,
                                       &product.choice.algorithm, workspace, workspace_bytes, stream);
    return status == kSuccess ? std::string() : Text("cublasLtMatmul", status);
  }

 private:
  using Key = std::tuple<int, bool, int64_t, int64_t, int64_t, int, unsigned, unsigned, unsigned>;
  static constexpr size_t kMostProducts = 512;

  static unsigned Alignment(const void* pointer) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    unsigned bytes = 256;
    while (address % bytes) bytes /= 2;
    return bytes;
  }

  std::string Text(const char* what, int status) const {
    return std::string(what) + " returned " + std::to_string(status) + " (" + library_.GetStatusString(status) + ")";
  }

  // The library's matrices lie column by column, so it is asked for c^T = b^T a^T: its A is our b, its B our a.
  std::string Choose(Handle handle, const Key& key, size_t workspace_bytes, Product* product) const {
    const auto [device, transpose_b, m, n, k, type, align_a, align_b, align_c] = key;
    constexpr int kTypes[] = {CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF};
    const int element = kTypes[type];
    void* preference = nullptr;
    int status = library_.MatmulDescCreate(&product->desc, kCompute32F, CUDA_R_32F);
    if (!status && transpose_b) {
      const int transposed = kTransposed;
      status = library_.MatmulDescSetAttribute(product->desc, kTransA, &transposed, sizeof(transposed));
    }
    const auto rows = static_cast<uint64_t>(transpose_b ? k : n), columns = static_cast<uint64_t>(transpose_b ? n : k);
    if (!status) status = library_.MatrixLayoutCreate(&product->a, element, rows, columns, transpose_b ? k : n);
    if (!status) status = library_.MatrixLayoutCreate(&product->b, element, static_cast<uint64_t>(k), static_cast<uint64_t>(m), k);
    if (!status) status = library_.MatrixLayoutCreate(&product->c, CUDA_R_32F, static_cast<uint64_t>(n), static_cast<uint64_t>(m), n);
    if (!status) status = library_.MatmulPreferenceCreate(&preference);
    const auto prefer = [&](int attribute, const auto& value) {
      if (!status) status = library_.MatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value));
    };
    prefer(kMaxWorkspace, static_cast<uint64_t>(workspace_bytes));
    prefer(kAlignmentA, static_cast<uint32_t>(align_b));
    prefer(kAlignmentB, static_cast<uint32_t>(align_a));
    prefer(kAlignmentC, static_cast<uint32_t>(align_c));
    prefer(kAlignmentD, static_cast<uint32_t>(align_c));
    if (!status) {
      int found = 0;
      const int answer = library_.MatmulAlgoGetHeuristic(handle, product->desc, product->a, product->b, product->c, product->c,
                                                         preference, 1, &product->choice, &found);
      // A shape or alignment that the library has no kernel for is no error: our own kernel takes it.
      product->found = answer == kSuccess && found > 0;
    }
    if (preference) library_.MatmulPreferenceDestroy(preference);
    return status ? Text("a cuBLASLt descriptor", status) : std::string();
  }

  void Destroy(Product* product) const {
    if (product->desc) library_.MatmulDescDestroy(product->desc);
    for (void* layout : {product->a, product->b, product->c})
      if (layout) library_.MatrixLayoutDestroy(layout);
  }

  void Clear() {
    for (auto& [key, product] : products_) Destroy(&product);
    products_.clear();
  }

  const Library& library_;
  std::mutex mutex_;
  std::map<int, Handle> handles_;
  std::map<Key, Product> products_;
};

const Library& TheLibrary() {
  static const Library library = Open();
  return library;
}

}  // namespace

const Gemm& DefaultGemm() {
  // Never destroyed: at the end of the process the driver may be gone before we are.
  static LibraryGemm* const shared = TheLibrary().name.empty() ? nullptr : new LibraryGemm(TheLibrary());
  static const Gemm gemm = [] {
    Gemm made;
    if (shared == nullptr) return made;
    made.host = shared;
    made.workspace_bytes = 32 << 20;  // what cuBLAS's documentation recommends for Hopper; others need less
    made.run = [](void* host, CUstream_st* stream, bool transpose_b, int64_t m, int64_t n, int64_t k, FloatType type,
                  const void* a, const void* b, float* c, void* workspace, size_t workspace_bytes) {
      return static_cast<LibraryGemm*>(host)->Run(stream, transpose_b, m, n, k, type, a, b, c, workspace, workspace_bytes);
    };
    return made;
  }();
  return gemm;
}

const std::string& DefaultGemmName() {
  static const std::string name = [] {
    const Library& library = TheLibrary();
    if (library.name.empty()) return "portable (" + library.why + ")";
    const size_t version = library.GetVersion();
    return "cuBLASLt " + std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
           std::to_string(version % 100) + " (" + library.name + ")";
  }();
  return name;
}

}  // namespace clada::cuda
