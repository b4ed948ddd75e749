// SPDX-License-Identifier: Apache-2.0
// Memory for the kernels' tests.
#ifndef CLADA_TESTS_BUFFER_H_
#define CLADA_TESTS_BUFFER_H_

#include <cstdint>
#include <vector>

// Exactly `count` elements on the heap, the first of them at an address that is aligned to the element only.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : bytes_((count + 1) * sizeof(T)) {}
  T* data() { return reinterpret_cast<T*>(bytes_.data() + sizeof(T)); }

 private:
  std::vector<char> bytes_;
};

#endif  // CLADA_TESTS_BUFFER_H_
