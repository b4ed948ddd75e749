// SPDX-License-Identifier: Apache-2.0
// What one instruction set provides for the down projection of a SparseFFN with quantised weights; the other products are those
// of quant_kernels.h. ffn_quant.cc decides what runs when. As there, no inline function of the standard library is used.
#ifndef CLADA_CPU_FFN_QUANT_KERNELS_H_
#define CLADA_CPU_FFN_QUANT_KERNELS_H_

#include "clada/quant_matmul_tables.h"

namespace clada::quant {

constexpr int64_t kUnitColumns = 32;    // neighbouring columns of w_out whose codes lie in whole bytes of each plane
constexpr int64_t kChunkColumns = 128;  // columns that are summed together: four units, fewer at the end of a row

// The bytes of a group of w_out, which holds 32 neighbouring neurons: their codes, neuron after neuron, then the columns' scales.
constexpr int64_t NeuronBytes(int64_t columns, int bits) { return columns * bits / 8; }
constexpr int64_t GroupBytes(int64_t columns, int bits) { return kBlock * NeuronBytes(columns, bits) + 2 * columns; }

// One row's down projection, over columns [first, end) of w_out.
struct DownCall {
  const uint8_t* w_out = nullptr;  // [groups, GroupBytes]
  int64_t columns = 0;
  int64_t groups = 0;
  int64_t first = 0, end = 0;     // multiples of kChunkColumns, or `columns`
  const float* scale = nullptr;   // [groups] of h in 8 bits
  const int32_t* sum = nullptr;   // [groups] of a group's numbers
  // Of each group the neurons whose h in 8 bits is not 0, and these numbers: only these neurons are read. Filled up to quads with
  // neuron 0 and the number 0.
  const uint8_t* list = nullptr;   // [groups, 32] each below 32
  const int8_t* q = nullptr;       // [groups, 32]
  const uint8_t* quads = nullptr;  // [groups] fours of neurons, at most 8
  float* y = nullptr;             // [columns]; the part is written
};

struct FfnKernels {
  // Indexed by the place in kFormatBits.
  void (*down[kFormats])(const DownCall& call);

  // The chunk at `column` of a group, as records of QuantMatMul: record t goes to records + t * stride, and holds the columns from
  // column + 32 * t on.
  void (*to_records[kFormats])(const uint8_t* group, int64_t columns, int64_t column, uint8_t* records, int64_t stride);
};

#if defined(__x86_64__)
extern const FfnKernels kAvx512VnniFfnKernels;
extern const FfnKernels kAvxVnniFfnKernels;
extern const FfnKernels kAvx2FfnKernels;
#endif
#if defined(__aarch64__)
extern const FfnKernels kNeonDotFfnKernels;
#endif
extern const FfnKernels kBaselineFfnKernels;

}  // namespace clada::quant

#endif  // CLADA_CPU_FFN_QUANT_KERNELS_H_
