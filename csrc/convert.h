// Rows between fp32 or bf16 memory and fp32 scratch.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace ctr {
namespace CTR_ISA {

inline float from_bf16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// out[r, c] (pitch floats a row, zero from columns up to pitch) = in[r, c] for r < rows, c < columns.
inline void read_rows(Type type, const void* in, int64_t stride, int64_t rows, int64_t columns, float* out,
                      int64_t pitch) {
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + r * pitch;
    if (type == Type::f32) {
      std::memcpy(to, static_cast<const float*>(in) + r * stride, columns * sizeof(float));
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(in) + r * stride;
      for (int64_t c = 0; c < columns; ++c) to[c] = from_bf16(from[c]);
    }
    for (int64_t c = columns; c < pitch; ++c) to[c] = 0.0f;
  }
}

inline void write_rows(Type type, const float* in, int64_t pitch, int64_t rows, int64_t columns, void* out,
                       int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = in + r * pitch;
    if (type == Type::f32) {
      std::memcpy(static_cast<float*>(out) + r * stride, from, columns * sizeof(float));
    } else {
      uint16_t* to = static_cast<uint16_t*>(out) + r * stride;
      for (int64_t c = 0; c < columns; ++c) to[c] = to_bf16(from[c]);
    }
  }
}

}  // namespace CTR_ISA
}  // namespace ctr
