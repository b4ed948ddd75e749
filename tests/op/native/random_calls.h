// SPDX-License-Identifier: Apache-2.0
// Random numbers and schedules for the kernels' tests. A test seeds `random_engine` before it takes any.
#ifndef CLADA_TESTS_RANDOM_CALLS_H_
#define CLADA_TESTS_RANDOM_CALLS_H_

#include <cstdint>
#include <random>

#include "buffer.h"
#include "clada/sparse_ffn.h"

inline std::mt19937 random_engine;

inline int64_t Pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_engine); }

inline float Normal() { return std::normal_distribution<float>()(random_engine); }

inline Buffer<float> Normals(int64_t count, float scale = 1.0f) {
  Buffer<float> buffer(count);
  for (int64_t i = 0; i < count; ++i) buffer.data()[i] = scale * Normal();
  return buffer;
}

// The bodies in reverse order: another schedule must give the same bits.
inline void Reverse(void*, size_t count, clada::ParallelBody body, void* context) {
  for (size_t i = count; i-- > 0;) body(context, i);
}

#endif  // CLADA_TESTS_RANDOM_CALLS_H_
