// SPDX-License-Identifier: Apache-2.0
// The table of kernels.h for a vector type V (see kernels_body.h).
#ifndef CLADA_CPU_KERNELS_TABLE_H_
#define CLADA_CPU_KERNELS_TABLE_H_

#include "kernels_block.h"
#include "kernels_body.h"

namespace {

template <class V>
constexpr clada::Kernels MakeKernels(const char* name) {
  return {name,
          {Dot<V, float>, Dot<V, Half>, Dot<V, BFloat>},
          {Axpy<V, float>, Axpy<V, Half>, Axpy<V, BFloat>},
          PackX<V>,
          {PackRows<V, float>, PackRows<V, Half>, PackRows<V, BFloat>},
          DotBlock<V>,
          {PackColumns<V, float>, PackColumns<V, Half>, PackColumns<V, BFloat>},
          AxpyBlock<V>,
          {Convert<V, float>, Convert<V, Half>, Convert<V, BFloat>},
          Shadow<V>,
          Fold<V>,
          Activate<V>,
          Add<V>,
          InversePower<V>};
}

}  // namespace

#endif  // CLADA_CPU_KERNELS_TABLE_H_
