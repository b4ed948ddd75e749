// SPDX-License-Identifier: Apache-2.0
// The contract of com.clada::QuantMatMul, version 1, as data: names, and the layout of a record.
//
// Made from plugins/quant_matmul.yaml by `make contract`. Change that file, and run it again; do not edit this one.
#ifndef CLADA_QUANT_MATMUL_TABLES_H_
#define CLADA_QUANT_MATMUL_TABLES_H_

#include <cstdint>

namespace clada::quant {

inline constexpr char kOpName[] = "QuantMatMul";
inline constexpr char kOpVersionText[] = "1";

constexpr int64_t kBlock = 32;     // neighbouring weights of a row that share a scale
constexpr int64_t kTileRows = 32;  // rows of the matrix that lie together
constexpr int64_t kStep = 4;       // neighbouring weights of a row that lie together
constexpr int kHighBits = 4;      // of a code, in the high plane
constexpr int kLeastExponent = -94;  // of 2: a block of x below it is zeros
constexpr int64_t kMostFeatures = 2147483648;

constexpr int kFormats = 4;
constexpr int kFormatBits[kFormats] = {4, 5, 6, 8};
inline constexpr char kFormatList[] = "4, 5, 6, 8";

// The bytes of a record: a block of each row of a tile. Its parts follow each other in this order.
constexpr int64_t PlaneBytes(int bits) { return kTileRows * kBlock * bits / 8; }
constexpr int64_t kHighBytes = PlaneBytes(kHighBits);
constexpr int64_t LowBytes(int bits) { return PlaneBytes(bits - kHighBits); }
constexpr int64_t kScaleBytes = kTileRows * 2;
constexpr int64_t RecordBytes(int bits, bool has_offset) {
  return kHighBytes + LowBytes(bits) + kScaleBytes * (has_offset ? 2 : 1);
}
static_assert(RecordBytes(4, false) == 576 && RecordBytes(4, true) == 640, "as documented");
static_assert(RecordBytes(5, false) == 704 && RecordBytes(5, true) == 768, "as documented");
static_assert(RecordBytes(6, false) == 832 && RecordBytes(6, true) == 896, "as documented");
static_assert(RecordBytes(8, false) == 1088 && RecordBytes(8, true) == 1152, "as documented");

struct Attributes {
  int64_t out_features = 0;
  int64_t bits = 8;
  bool has_offset = false;
  bool has_bias = false;
};

constexpr int kRequiredInputs = 2;
inline constexpr const char* kInputNames[] = {"x", "weight", "bias"};

}  // namespace clada::quant

#endif  // CLADA_QUANT_MATMUL_TABLES_H_
