// SPDX-License-Identifier: Apache-2.0
// float32 to 16 bits, as IEEE 754 rounds by default.
#include <cstring>

#include "plan.h"

namespace clada {
namespace {

uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

uint16_t ToBFloat16(float value) {
  const uint32_t bits = Bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

uint16_t ToFloat16(float value) {
  const uint32_t bits = Bits(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (rest < 0x38800000u) {
    // Below 2^-14: a multiple of 2^-24. Adding 0.5 leaves exactly those bits, rounded by the addition itself.
    float magnitude;
    std::memcpy(&magnitude, &rest, sizeof(magnitude));
    return static_cast<uint16_t>(sign | (Bits(magnitude + 0.5f) - Bits(0.5f)));
  }
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
}

}  // namespace

void Narrow(FloatType type, const float* source, int64_t count, uint16_t* target) {
  if (type == FloatType::kFloat16)
    for (int64_t i = 0; i < count; ++i) target[i] = ToFloat16(source[i]);
  else
    for (int64_t i = 0; i < count; ++i) target[i] = ToBFloat16(source[i]);
}

}  // namespace clada
