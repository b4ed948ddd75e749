// SPDX-License-Identifier: Apache-2.0
// Compiled with the flags of quant_avx512vnni.cc, -mamx-tile and -mamx-int8.
#if defined(__x86_64__)

#include "quant_avx512vnni.h"

namespace {

constexpr int64_t kAmxRows = 16;  // of a tile register; a block's products of so many rows with 16 rows of the matrix are one instruction
constexpr int64_t kFewRows = 7;   // up to here vectors are as fast: measured
constexpr int64_t kBlocksAtOnce = 16;  // 16 KB of codes

// Tile registers: 0 is x [rows, 32] in bytes; 1 and 2 are the codes [8 steps, 16 rows, 4]; 4 and 5 the sums [rows, 16] in 32 bits.
// Register 3 is not configured: one with bytes and no rows is a fault.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {kBlock, 64, 64, 0, 64, 64};
  uint8_t rows[16] = {0, kSteps, kSteps, 0, 0, 0};
};

// The steps of a record's 16 rows from `group` on, less zero, as tile registers take them.
template <int kBits, int kStepAt = 0>
inline void Expand(const uint8_t* high, const uint8_t* low, __m512i zero, int8_t* codes) {
  if constexpr (kStepAt < kSteps) {
    _mm512_store_si512(codes + 64 * kStepAt, _mm512_sub_epi8(Codes<Avx512Vnni, kBits, kStepAt>(high, low), zero));
    Expand<kBits, kStepAt + 1>(high, low, zero, codes);
  }
}

// TileRun's sums for many rows: the same integers, and the same sums of floats in the same order. Codes are expanded for some blocks at
// a time, and then serve all rows.
template <int kBits, bool kOffset>
void AmxRun(const uint8_t* tile, const XRows& x, int64_t rows, float* out) {
  constexpr int64_t kRecord = RecordBytes(kBits, kOffset), kScales = kHighBytes + LowBytes(kBits);
  using V = Avx512Vnni;
  alignas(64) int8_t codes[kBlocksAtOnce][2][kSteps * 64];
  alignas(64) int32_t sums[2][2][kAmxRows][16];
  for (int64_t i = 0; i < rows * kTileRows; i += V::kLanes) V::Store(out + i, V::Set(0.0f));
  const __m512i zero = V::SetByte(1 << (kBits - 1));
  for (int64_t first = 0; first < x.blocks; first += kBlocksAtOnce) {
    const int64_t end = first + kBlocksAtOnce < x.blocks ? first + kBlocksAtOnce : x.blocks;
    for (int64_t b = first; b < end; ++b)
      for (int g = 0; g < 2; ++g) {
        const uint8_t* high = tile + b * kRecord + g * V::kLanes * kStep;
        Expand<kBits>(high, high + kHighBytes, zero, codes[b - first][g]);
      }
    for (int64_t row = 0; row < rows; row += kAmxRows) {
      const int64_t count = rows - row < kAmxRows ? rows - row : kAmxRows;
      Config config;
      config.rows[0] = config.rows[4] = config.rows[5] = static_cast<uint8_t>(count);
      _tile_loadconfig(&config);
      for (int64_t b = first; b < end; ++b) {
        auto& sum = sums[b % 2];  // two in turn: the next block's products need not wait for these to be read
        _tile_loadd(0, x.q + (row * x.blocks + b) * kBlock, x.blocks * kBlock);
        _tile_loadd(1, codes[b - first][0], 64);
        _tile_loadd(2, codes[b - first][1], 64);
        _tile_zero(4);
        _tile_zero(5);
        _tile_dpbssd(4, 0, 1);
        _tile_dpbssd(5, 0, 2);
        _tile_stored(4, sum[0], 64);
        _tile_stored(5, sum[1], 64);
        const uint8_t* scales = tile + b * kRecord + kScales;
        for (int g = 0; g < 2; ++g) {
          const __m512 weights = V::LoadHalf(scales + g * V::kLanes * 2);
          __m512 offsets = V::Set(0.0f);
          if constexpr (kOffset) offsets = V::LoadHalf(scales + clada::quant::kScaleBytes + g * V::kLanes * 2);
          for (int64_t r = 0; r < count; ++r) {
            float* target = out + (row + r) * kTileRows + g * V::kLanes;
            const int64_t at = (row + r) * x.blocks + b;
            const __m512 scale = V::Set(x.scale[at]);
            __m512 total = V::Fma(V::ToFloat(_mm512_load_si512(sum[g][r])), V::Mul(scale, weights), _mm512_loadu_ps(target));
            if constexpr (kOffset) total = V::Fma(V::Set(static_cast<float>(x.sum[at])), V::Mul(scale, offsets), total);
            V::Store(target, total);
          }
        }
      }
    }
  }
  _tile_release();
}

template <int kBits, bool kOffset>
void AmxTile(const uint8_t* tile, const XRows& x, int64_t rows, float* out) {
  rows <= kFewRows ? Tile<Avx512Vnni, kBits, kOffset>(tile, x, rows, out) : AmxRun<kBits, kOffset>(tile, x, rows, out);
}

}  // namespace

const clada::quant::Kernels clada::quant::kAmxKernels = {
    "amx",
    clada::quant::kMostRunRows,
    Quantise<Avx512Vnni>,
    {{AmxTile<kFormatBits[0], false>, AmxTile<kFormatBits[0], true>},
     {AmxTile<kFormatBits[1], false>, AmxTile<kFormatBits[1], true>},
     {AmxTile<kFormatBits[2], false>, AmxTile<kFormatBits[2], true>},
     {AmxTile<kFormatBits[3], false>, AmxTile<kFormatBits[3], true>}}};

#endif  // __x86_64__
