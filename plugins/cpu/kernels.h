// SPDX-License-Identifier: Apache-2.0
// The vector primitives that one instruction set provides. Everything that decides is written once, on top of them.
//
// The files that implement the table are compiled with flags of their own, so they and this header use no inline function of
// the standard library: the linker could keep the copy with instructions that the machine lacks.
#ifndef CLADA_CPU_KERNELS_H_
#define CLADA_CPU_KERNELS_H_

#include "clada/sparse_ffn.h"

namespace clada {

constexpr int64_t kPanelColumns = 48;  // rows of w_in, or columns of w_out, that are multiplied together
constexpr int64_t kRunRows = 8;        // rows that are multiplied together, at most
// Every instruction set's vectors divide this.
constexpr int64_t PackedSize(int64_t d) { return (d + 15) / 16 * 16; }

// A panel's place in a sum over neurons: the panels of a chunk are added up in memory of their own, and with the last of them to y,
// or, in the first chunk, to `start` [columns].
struct PanelSum {
  bool first;
  bool last;
  const float* start;
};

struct Kernels {
  const char* name;

  // out[i * subrows + s] = x . w[neuron list[i]][s]. Neurons lie `stride` weights apart, their subrows (1 or 2) follow each
  // other. list == null: neurons 0 .. count - 1. Indexed by FloatType.
  void (*dot[3])(const float* x, const void* w, int64_t d, int64_t stride, int subrows, const int32_t* list, int64_t count,
                 float* out);

  // y[0..d) += sum over i of coefficient[i] * w[list[i]], in the order of the list.
  void (*axpy[3])(const float* coefficient, const void* w, int64_t d, const int32_t* list, int64_t count, float* y);

  // What dot_block reads: rows of x, and up to kPanelColumns rows of w, which follow each other. PackedSize(d) numbers a row of x;
  // kPanelColumns times that for w, whatever `count` is, at a 64-byte boundary.
  void (*pack_x)(const float* x, const int32_t* rows, int64_t row_count, int64_t d, float* packed);
  void (*pack_rows[3])(const void* w, int64_t d, int64_t count, float* packed);

  // out[r * kPanelColumns + c] = x[r] . w[c], packed both: dot's sums. A run of rows begins at the multiple of kRunRows that it began
  // at when it was packed.
  void (*dot_block)(const float* x, int64_t row_count, const float* packed, int64_t d, float* out);

  // `columns` neighbouring columns of `count` rows of w, d apart: panel [count, kPanelColumns] float32, filled up with zeros.
  void (*pack_columns[3])(const void* w, int64_t d, int64_t count, int64_t columns, float* panel);

  // Axpy's sums for many rows: y[rows[i]][0..columns) += sum over j of h[i * h_stride + j] * panel[j]; the rows of y are d apart.
  // `part` [row_count, kPanelColumns] is scratch memory that stays between the panels of a chunk.
  void (*axpy_block)(const float* h, int64_t h_stride, int64_t row_count, const float* panel, int64_t count, PanelSum sum,
                     float* part, float* y, const int32_t* rows, int64_t d, int64_t columns);

  // Weights to float32.
  void (*convert[3])(const void* w, int64_t count, float* out);

  // out[i] = x . (offset + scale * q) of row i of the 4-bit copy. `folded` comes from fold.
  void (*shadow)(const float* x, const float* folded, const uint8_t* q, const uint16_t* scale, int64_t d, int64_t count,
                 float* out);

  // folded[2 b] = 0, folded[2 b + 1] = sum of block b of x: what the blocks' (scale, offset) pairs are multiplied with.
  void (*fold)(const float* x, int64_t d, float* folded);

  // hidden[i] = act(pre[i]), or act(pre[2 i]) * pre[2 i + 1] when gated.
  void (*activate)(Activation activation, bool gated, const float* pre, int64_t count, float* hidden);

  // y[i] += a[i].
  void (*add)(const float* a, int64_t count, float* y);

  // out[i] = r[i] ^ -gamma for r >= 0, gamma > 0.
  void (*inverse_power)(const float* r, int64_t count, float gamma, float* out);
};

#if defined(__x86_64__)
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
#endif
extern const Kernels kBaselineKernels;

}  // namespace clada

#endif  // CLADA_CPU_KERNELS_H_
