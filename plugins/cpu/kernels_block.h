// SPDX-License-Identifier: Apache-2.0
// Many rows at a time: the same sums as Dot and Axpy, in the same order, so that a prompt's row has the bits of the row alone.
// A tile of sums stays in registers while the numbers that it is made of stream past; what a tile reads again is in the caches.
#ifndef CLADA_CPU_KERNELS_BLOCK_H_
#define CLADA_CPU_KERNELS_BLOCK_H_

#include "kernels_body.h"

namespace {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls body(first, Constant<size>) for runs of kMost rows, and of halves of that for the rest.
template <int kMost, class Body>
inline void EachRun(int64_t first, int64_t count, const Body& body) {
  for (; first + kMost <= count; first += kMost) body(first, Constant<kMost>());
  if constexpr (kMost > 1) EachRun<kMost / 2>(first, count, body);
}

// DotRow's order of sums without its lanes. What lane i of accumulator a adds up is a sum of its own here, a segment, over every
// (2 * kWidth)th number of the row. Segments are walked so that the tree of additions at the end adds neighbours first: the
// accumulators, then the lanes whose numbers differ in their highest bit, and so on.
template <class V>
struct Segments {
  static constexpr int kCount = 2 * static_cast<int>(V::kWidth);
  // Vectors of a row; the last may be filled up with zeros.
  static int64_t Vectors(int64_t d) { return (d + V::kWidth - 1) / V::kWidth; }
  static int64_t Steps(int segment, int64_t vectors) { return (vectors + 1 - segment % 2) / 2; }
  static int64_t Lane(int segment) {
    int64_t lane = 0;
    for (int64_t bit = V::kWidth / 2, rest = segment / 2; bit > 0; bit /= 2, rest /= 2) lane += rest % 2 * bit;
    return lane;
  }
  // Where the segments of accumulator `turn` lie that lane `lane` makes, in steps from the beginning.
  static int64_t Offset(int segment, int64_t vectors) { return segment / 2 * vectors + segment % 2 * ((vectors + 1) / 2); }
};

// Rows of x as DotBlock reads them: runs of EachRun, in a run the segments, in a segment its numbers, of each number all rows.
template <class V>
void PackX(const float* x, const int32_t* rows, int64_t row_count, int64_t d, float* packed) {
  using S = Segments<V>;
  const int64_t vectors = S::Vectors(d);
  EachRun<V::kPanelRows>(0, row_count, [&](int64_t first, auto run) {
    constexpr int kRows = decltype(run)::value;
    float* out = packed + first * vectors * V::kWidth;
    for (int segment = 0; segment < S::kCount; ++segment)
      for (int64_t t = 0; t < S::Steps(segment, vectors); ++t) {
        const int64_t k = (2 * t + segment % 2) * V::kWidth + S::Lane(segment);
        for (int r = 0; r < kRows; ++r) *out++ = k < d ? x[rows[first + r] * d + k] : 0.0f;
      }
  });
}

template <class W>
struct IsFloat {
  static constexpr bool value = false;
};
template <>
struct IsFloat<float> {
  static constexpr bool value = true;
};

// Rows of w as DotBlock reads them: the segments, in a segment its numbers, of each number kPanelColumns rows; those beyond `count`
// are 0.
template <class V, class W>
void PackRows(const void* weights, int64_t d, int64_t count, float* packed) {
  using S = Segments<V>;
  constexpr int64_t kWidth = V::kWidth;
  const W* w = static_cast<const W*>(weights);
  const int64_t vectors = S::Vectors(d);
  float* place[S::kCount];  // by accumulator and lane
  for (int segment = 0; segment < S::kCount; ++segment)
    place[segment % 2 * kWidth + S::Lane(segment)] = packed + S::Offset(segment, vectors) * clada::kPanelColumns;
  for (int64_t first = 0; first < clada::kPanelColumns; first += kWidth)
    for (int64_t i = 0; i < vectors; ++i) {
      typename V::F columns[kWidth];
      bool loaded = false;
      if constexpr (IsFloat<W>::value) {
        loaded = first + kWidth <= count && (i + 1) * kWidth <= d;
        if (loaded) V::LoadColumns(w + first * d + i * kWidth, d, columns);
      }
      if (!loaded) {
        alignas(64) float part[kWidth * kWidth];
        for (int64_t c = 0; c < kWidth; ++c) {
          const W* row = w + (first + c) * d + i * kWidth;
          const int64_t left = first + c < count ? d - i * kWidth : 0;
          V::Store(part + c * kWidth, left >= kWidth ? V::LoadWeight(row) : left > 0 ? LoadPart<V>(row, left) : V::Set(0.0f));
        }
        V::LoadColumns(part, kWidth, columns);
      }
      for (int64_t lane = 0; lane < kWidth; ++lane)
        V::Store(place[i % 2 * kWidth + lane] + i / 2 * clada::kPanelColumns + first, columns[lane]);
    }
}

// out[r][c] = x[r] . w[c] for a run of rows.
template <class V, int kRows>
void DotTile(const float* x, const float* packed, int64_t vectors, float* out) {
  using F = typename V::F;
  using S = Segments<V>;
  constexpr int64_t kWidth = V::kWidth, kVectors = clada::kPanelColumns / kWidth / V::kPanelParts;
  constexpr int kLevels = kWidth == 16 ? 5 : 4;
  static_assert(S::kCount == 1 << kLevels, "the tree has a leaf for each segment");
  for (int64_t column = 0; column < clada::kPanelColumns; column += kVectors * kWidth) {
    F tree[kLevels + 1][kRows][kVectors];
    const float* values = x;
    const float* weights = packed + column;
    for (int segment = 0; segment < S::kCount; ++segment) {
      F sum[kRows][kVectors];
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sum[r][v] = V::Set(0.0f);
      for (int64_t t = S::Steps(segment, vectors); t > 0; --t, values += kRows, weights += clada::kPanelColumns) {
        F w[kVectors];
        for (int v = 0; v < kVectors; ++v) w[v] = V::Load(weights + v * kWidth);
        for (int r = 0; r < kRows; ++r) {
          const F value = V::Set(values[r]);
          for (int v = 0; v < kVectors; ++v) sum[r][v] = V::Fma(w[v], value, sum[r][v]);
        }
      }
      // Two sums of a level make one of the next.
      int level = 0;
      for (; segment >> level & 1; ++level)
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < kVectors; ++v) sum[r][v] = V::Add(tree[level][r][v], sum[r][v]);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) tree[level][r][v] = sum[r][v];
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) V::Store(out + r * clada::kPanelColumns + column + v * kWidth, tree[kLevels][r][v]);
  }
}

template <class V>
void DotBlock(const float* x, int64_t row_count, const float* packed, int64_t d, float* out) {
  const int64_t vectors = Segments<V>::Vectors(d);
  EachRun<V::kPanelRows>(0, row_count, [&](int64_t r, auto run) {
    DotTile<V, decltype(run)::value>(x + r * vectors * V::kWidth, packed, vectors, out + r * clada::kPanelColumns);
  });
}

// Sums over the neurons of one panel of w_out, for some columns of some rows of y.
template <class V, int kRows>
void AxpyTile(const float* h, int64_t h_stride, const float* panel, int64_t count, const clada::PanelSum& sum, float* part,
              float* const* y, int64_t columns) {
  using F = typename V::F;
  constexpr int64_t kWidth = V::kWidth, kVectors = clada::kPanelColumns / kWidth / V::kPanelParts;
  for (int64_t at = 0; at < columns; at += kVectors * kWidth) {
    F total[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        total[r][v] = sum.first ? V::Set(0.0f) : V::Load(part + r * clada::kPanelColumns + at + v * kWidth);
    for (int64_t j = 0; j < count; ++j) {
      F weights[kVectors];
      for (int v = 0; v < kVectors; ++v) weights[v] = V::Load(panel + j * clada::kPanelColumns + at + v * kWidth);
      for (int r = 0; r < kRows; ++r) {
        const F value = V::Set(h[r * h_stride + j]);
        for (int v = 0; v < kVectors; ++v) total[r][v] = V::Fma(value, weights[v], total[r][v]);
      }
    }
    if (sum.last && at + kVectors * kWidth <= columns) {
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) {
          float* target = y[r] + at + v * kWidth;
          V::Store(target, V::Add(V::Load(sum.start ? sum.start + at + v * kWidth : target), total[r][v]));
        }
      continue;
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) V::Store(part + r * clada::kPanelColumns + at + v * kWidth, total[r][v]);
    if (sum.last)
      for (int r = 0; r < kRows; ++r)
        for (int64_t c = at; c < columns && c < at + kVectors * kWidth; ++c)
          y[r][c] = (sum.start ? sum.start[c] : y[r][c]) + part[r * clada::kPanelColumns + c];
  }
}

template <class V>
void AxpyBlock(const float* h, int64_t h_stride, int64_t row_count, const float* panel, int64_t count, clada::PanelSum sum,
               float* part, float* y, const int32_t* rows, int64_t d, int64_t columns) {
  EachRun<V::kPanelRows>(0, row_count, [&](int64_t r, auto run) {
    constexpr int kRows = decltype(run)::value;
    float* pointers[kRows];
    for (int i = 0; i < kRows; ++i) pointers[i] = y + rows[r + i] * d;
    AxpyTile<V, kRows>(h + r * h_stride, h_stride, panel, count, sum, part + r * clada::kPanelColumns, pointers, columns);
  });
}

template <class V, class W>
void PackColumns(const void* weights, int64_t d, int64_t count, int64_t columns, float* panel) {
  const W* w = static_cast<const W*>(weights);
  for (int64_t j = 0; j < count; ++j) {
    const W* row = w + j * d;
    float* out = panel + j * clada::kPanelColumns;
    for (int64_t i = 0; i < clada::kPanelColumns; i += V::kWidth) {
      if (i + V::kWidth <= columns)
        V::Store(out + i, V::LoadWeight(row + i));
      else
        V::Store(out + i, i < columns ? LoadPart<V>(row + i, columns - i) : V::Set(0.0f));
    }
  }
}

}  // namespace

#endif  // CLADA_CPU_KERNELS_BLOCK_H_
