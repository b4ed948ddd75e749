// SPDX-License-Identifier: Apache-2.0
// Where a constant weight is read from while its node lives.
#ifndef CLADA_ORT_WEIGHT_MEMORY_H_
#define CLADA_ORT_WEIGHT_MEMORY_H_

#include <cstddef>
#include <memory>

namespace clada::ort {

enum class WeightMemory {
  kOwn,      // weights that are mapped from a file are copied into large pages, and the file's pages given back
  kInPlace,  // for weights that are too large to be in memory: they stay in the file
};

// Memory that holds a weight's bytes, for as long as this lives.
using KeptWeight = std::shared_ptr<const void>;

// `data` must outlive what is returned: what needs no copy, or finds no memory for one, stays where it is. A copy begins at a
// multiple of 256 bytes. Where `data` is memory of the runtime's own, it is put on large pages in place. Nodes with the same
// weight share a copy. Takes the time of reading and writing the weight; safe from several threads. Throws nothing but bad_alloc.
KeptWeight KeepWeight(const void* data, size_t bytes, WeightMemory memory);

}  // namespace clada::ort

#endif  // CLADA_ORT_WEIGHT_MEMORY_H_
