// SPDX-License-Identifier: Apache-2.0
#include "instruction_sets.h"

#include <cstring>
#include <iterator>
#include <string>

#include "clada/quant_matmul.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace clada {
namespace {

#if defined(__x86_64__)
bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool HasAvxVnni() { return HasAvx2() && __builtin_cpu_supports("avxvnni"); }
bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool HasAvx512Vnni() { return HasAvx512() && __builtin_cpu_supports("avx512vnni"); }
bool HasAmx() {
#if defined(__linux__)
  if (!HasAvx512Vnni() || !__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-int8")) return false;
  // The kernel gives a process the tile registers when it asks for them, and refuses where a thread's signal stack is too small.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif
#if defined(__aarch64__) && defined(__linux__)
bool HasNeonDot() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#endif
bool Always() { return true; }

// Best first.
constexpr InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"amx", HasAmx, &kAvx512Kernels, &quant::kAmxKernels, &quant::kAvx512VnniFfnKernels},
    {"avx512vnni", HasAvx512Vnni, &kAvx512Kernels, &quant::kAvx512VnniKernels, &quant::kAvx512VnniFfnKernels},
    {"avx512", HasAvx512, &kAvx512Kernels, &quant::kAvx2Kernels, &quant::kAvx2FfnKernels},
    {"avxvnni", HasAvxVnni, &kAvx2Kernels, &quant::kAvxVnniKernels, &quant::kAvxVnniFfnKernels},
    {"avx2", HasAvx2, &kAvx2Kernels, &quant::kAvx2Kernels, &quant::kAvx2FfnKernels},
#endif
#if defined(__aarch64__) && defined(__linux__)
    {"neondot", HasNeonDot, &kBaselineKernels, &quant::kNeonDotKernels, &quant::kNeonDotFfnKernels},
#endif
    {"baseline", Always, &kBaselineKernels, &quant::kBaselineKernels, &quant::kBaselineFfnKernels},
};

}  // namespace

const InstructionSet* FindInstructionSet(const char* name) {
  const bool any = name == nullptr || *name == 0;
  for (const InstructionSet& set : kSets)
    if ((any || std::strcmp(name, set.name) == 0) && set.is_here()) return &set;
  return nullptr;
}

const char* InstructionSetNames() {
  static const std::string names = [] {
    std::string list;
    for (const InstructionSet& set : kSets) {
      const bool last = &set == std::end(kSets) - 1;
      list += (list.empty() ? "" : last ? " or " : ", ") + std::string(set.name);
    }
    return list;
  }();
  return names.c_str();
}

const Kernels* FindKernels(const char* name) {
  const InstructionSet* set = FindInstructionSet(name);
  return set ? set->sparse_ffn : nullptr;
}

const char* KernelsName(const Kernels* kernels) { return kernels->name; }

namespace quant {

const Kernels* FindKernels(const char* name) {
  const InstructionSet* set = FindInstructionSet(name);
  return set ? set->quant_matmul : nullptr;
}

const char* KernelsName(const Kernels* kernels) { return kernels->name; }

}  // namespace quant
}  // namespace clada
