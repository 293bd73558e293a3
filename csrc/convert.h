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

// to[c] = from[c] for c < columns, in vectors: a call of memcpy takes longer than a row. Zeros follow up to a multiple of
// W where kPad.
template <bool kPad>
inline void copy_row(const float* from, int64_t columns, float* to) {
  int64_t c = 0;
  for (; c + W <= columns; c += W) store(to + c, load(from + c));
  if (c == columns) return;
  const Vec rest = load_part(from + c, columns - c);
  if (kPad) store(to + c, rest);
  else store_part(to + c, rest, columns - c);
}

// out[r, c] (pitch floats a row, a multiple of W; zero from columns up to pitch) = in[r, c] for r < rows, c < columns.
inline void read_rows(Type type, const void* in, int64_t stride, int64_t rows, int64_t columns, float* out,
                      int64_t pitch) {
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + r * pitch;
    int64_t c = columns;
    if (type == Type::f32) {
      copy_row<true>(static_cast<const float*>(in) + r * stride, columns, to);
      c = (columns + W - 1) / W * W;
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(in) + r * stride;
      for (int64_t i = 0; i < columns; ++i) to[i] = from_bf16(from[i]);
    }
    for (; c < pitch; ++c) to[c] = 0.0f;
  }
}

inline void write_rows(Type type, const float* in, int64_t pitch, int64_t rows, int64_t columns, void* out,
                       int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = in + r * pitch;
    if (type == Type::f32) {
      copy_row<false>(from, columns, static_cast<float*>(out) + r * stride);
    } else {
      uint16_t* to = static_cast<uint16_t*>(out) + r * stride;
      for (int64_t c = 0; c < columns; ++c) to[c] = to_bf16(from[c]);
    }
  }
}

}  // namespace CTR_ISA
}  // namespace ctr
