// SPDX-License-Identifier: Apache-2.0
// What one instruction set provides for com.clada::QuantMatMul. quant_matmul.cc decides what runs when.
//
// As with kernels.h, the files that implement the table are compiled with flags of their own, so they and this header use no inline
// function of the standard library.
#ifndef CLADA_CPU_QUANT_KERNELS_H_
#define CLADA_CPU_QUANT_KERNELS_H_

#include "clada/quant_matmul_tables.h"

namespace clada::quant {

// Rows of x in 8 bits, one after the other.
struct XRows {
  const int8_t* q = nullptr;     // [rows, 32 * blocks], none is -128
  const float* scale = nullptr;  // [rows, blocks]
  const int32_t* sum = nullptr;  // [rows, blocks] of a block's q
  int64_t blocks = 0;
};

constexpr int64_t kMostRunRows = 64;

struct Kernels {
  const char* name;
  int64_t run_rows;  // rows that read a tile's memory once, at most kMostRunRows

  // One row of x in 8 bits.
  void (*quantise)(const float* x, int64_t blocks, int8_t* q, float* scale, int32_t* sum);

  // out[r * kTileRows + j] = x[r] . row j of the tile, without the bias, for up to run_rows rows. Indexed by the place in kFormatBits, and by has_offset.
  void (*tile[kFormats][2])(const uint8_t* tile, const XRows& x, int64_t rows, float* out);
};

#if defined(__x86_64__)
extern const Kernels kAmxKernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx2Kernels;
#endif
#if defined(__aarch64__)
extern const Kernels kNeonDotKernels;
#endif
extern const Kernels kBaselineKernels;

}  // namespace clada::quant

#endif  // CLADA_CPU_QUANT_KERNELS_H_
