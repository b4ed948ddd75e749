// SPDX-License-Identifier: Apache-2.0
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "device.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define CLADA_ASAN 1
#endif

namespace clada::cuda {
namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 << 10;

struct Warp {
  int arrived = 0;
  int size = 0;
  unsigned generation = 0;
  void* arguments[32] = {};
};

// Where a stack stopped. swapcontext makes two system calls a switch; it is used only where the address sanitizer follows the
// stacks. Elsewhere it starts a fiber, and _setjmp and _longjmp go to and fro.
struct Point {
  ucontext_t context;
#ifndef CLADA_ASAN
  jmp_buf jump;
  bool started = false;
#endif
};

__attribute__((noinline)) void Go(Point* from, Point* to) {
#ifdef CLADA_ASAN
  swapcontext(&from->context, &to->context);
#else
  if (_setjmp(from->jump)) return;
  if (to->started) _longjmp(to->jump, 1);
  to->started = true;
  setcontext(&to->context);
#endif
}

struct Fiber {
  Point point;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
  Position position;
  void* fake_stack = nullptr;  // the address sanitizer's
};

// The block that runs in this OS thread.
struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;  // as many as the largest block so far
  std::vector<Warp> warps;
  size_t size = 0;
  size_t current = 0;
  size_t at_barrier = 0;
  unsigned barrier_generation = 0;
  Point scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  const std::function<void()>* kernel = nullptr;
};

thread_local Block block;

void SwitchTo(Fiber& fiber) {
#ifdef CLADA_ASAN
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
#endif
  Go(&block.scheduler, &fiber.point);
#ifdef CLADA_ASAN
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void Yield() {
  Fiber& self = *block.fibers[block.current];
#ifdef CLADA_ASAN
  __sanitizer_start_switch_fiber(self.done ? nullptr : &self.fake_stack, block.scheduler_stack, block.scheduler_stack_bytes);
#endif
  Go(&self.point, &block.scheduler);
#ifdef CLADA_ASAN
  __sanitizer_finish_switch_fiber(self.fake_stack, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
}

void Enter() {
#ifdef CLADA_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
  (*block.kernel)();
  block.fibers[block.current]->done = true;
  Yield();
}

// On its own: getcontext returns twice, by the compiler's lights.
__attribute__((noinline)) void Prepare(Fiber& fiber) {
  fiber.done = false;
  ucontext_t& context = fiber.point.context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, &Enter, 0);
#ifndef CLADA_ASAN
  fiber.point.started = false;
#endif
}

void RunBlock() {
  for (size_t i = 0; i < block.size; ++i) Prepare(*block.fibers[i]);
#ifndef CLADA_ASAN
  block.scheduler.started = true;
#endif
  block.at_barrier = 0;
  for (size_t i = 0; i < block.warps.size(); ++i) {
    block.warps[i] = {};
    block.warps[i].size = static_cast<int>(std::min<size_t>(32, block.size - 32 * i));
  }
  // Round after round; a round in which no thread got anywhere can't be followed by a better one.
  for (size_t left = block.size; left > 0;) {
    const size_t left_before = left;
    unsigned progress = block.barrier_generation;
    for (const Warp& warp : block.warps) progress += warp.generation;
    for (block.current = 0; block.current < block.size; ++block.current) {
      Fiber& fiber = *block.fibers[block.current];
      if (fiber.done) continue;
      SwitchTo(fiber);
      left -= fiber.done;
    }
    unsigned now = block.barrier_generation;
    for (const Warp& warp : block.warps) now += warp.generation;
    if (left > 0 && left == left_before && now == progress) {
      std::fprintf(stderr, "CUDA emulation: %zu of %zu threads of a block wait for threads that do not come\n", left, block.size);
      std::abort();
    }
  }
}

}  // namespace

const Position& Here() { return block.fibers[block.current]->position; }

void SyncBlock() {
  const unsigned generation = block.barrier_generation;
  if (++block.at_barrier == block.size) {
    block.at_barrier = 0;
    ++block.barrier_generation;
    return;
  }
  while (block.barrier_generation == generation) Yield();
}

void SyncWarp(void* argument, void (*together)(void* const (&arguments)[32])) {
  Warp& warp = block.warps[block.current / 32];
  const unsigned generation = warp.generation;
  warp.arguments[block.current % 32] = argument;
  if (++warp.arrived == warp.size) {
    if (warp.size != 32) {
      std::fprintf(stderr, "CUDA emulation: a warp of %d threads can't do anything together\n", warp.size);
      std::abort();
    }
    together(warp.arguments);
    warp.arrived = 0;
    ++warp.generation;
    return;
  }
  while (warp.generation == generation) Yield();
}

cudaError_t Run(dim3 grid, dim3 size, const std::function<void()>& kernel) {
  // A device that fails, for tests: launch number CLADA_EMULATION_FAILS_AT of the process, counted from 1.
  static const char* const fails_at = std::getenv("CLADA_EMULATION_FAILS_AT");
  static std::atomic<int> launches{0};
  if (++launches == (fails_at ? std::atoi(fails_at) : 0)) return cudaErrorLaunchFailure;
  const size_t threads = static_cast<size_t>(size.x) * size.y * size.z;
  // What the device itself refuses.
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
      grid.x > 0x7fffffffu)
    return cudaErrorInvalidConfiguration;
  while (block.fibers.size() < threads) block.fibers.push_back(std::make_unique<Fiber>());
  block.size = threads;
  block.warps.assign((threads + 31) / 32, {});
  block.kernel = &kernel;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        for (size_t i = 0; i < threads; ++i) {
          const unsigned t = static_cast<unsigned>(i);
          block.fibers[i]->position = {{t % size.x, t / size.x % size.y, t / size.x / size.y}, {x, y, z}, size, grid};
        }
        RunBlock();
      }
  return cudaSuccess;
}

}  // namespace emulation

float HalfToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, fraction = bits & 0x3ffu;
  float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                    : exponent     ? std::ldexp(static_cast<float>(fraction | 0x400u), static_cast<int>(exponent) - 25)
                                   : std::ldexp(static_cast<float>(fraction), -24);
  return sign ? -magnitude : magnitude;
}

uint16_t FloatToHalf(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000u : 0u;
  const float magnitude = std::fabs(value);
  if (magnitude == 0.0f) return sign;
  if (std::isnan(value)) return sign | 0x7e00u;
  if (magnitude >= 65520.0f) return sign | 0x7c00u;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  // The unit of the last place; below 2^-14 it is 2^-24. nearbyint rounds ties to even.
  const int unit = std::max(exponent - 11, -24);
  const float steps = std::nearbyint(std::ldexp(magnitude, -unit));
  if (unit == -24) return sign | static_cast<uint16_t>(steps);
  return sign | static_cast<uint16_t>(((unit + 24) << 10) + static_cast<int>(steps));
}

uint16_t FloatToBFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace clada::cuda
