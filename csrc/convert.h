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

// Row by row to[c] = from[c] for c < columns, in vectors: a call of memcpy takes longer than a row. Zeros follow up to a
// multiple of W where kPad.
template <bool kPad>
inline void copy_rows(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t pitch) {
  const int64_t whole = columns / W * W, left = columns - whole;
  for (int64_t r = 0; r < rows; ++r, from += stride, to += pitch) {
    for (int64_t c = 0; c < whole; c += W) store(to + c, load(from + c));
    if (left == 0) continue;
    const Vec rest = load_part(from + whole, left);
    if (kPad) store(to + whole, rest);
    else store_part(to + whole, rest, left);
  }
}

// out[r, c] (pitch floats a row, a multiple of W; zero from columns up to pitch) = in[r, c] for r < rows, c < columns.
inline void read_rows(Type type, const void* in, int64_t stride, int64_t rows, int64_t columns, float* out,
                      int64_t pitch) {
  int64_t filled = columns;
  if (type == Type::f32) {
    copy_rows<true>(static_cast<const float*>(in), stride, rows, columns, out, pitch);
    filled = (columns + W - 1) / W * W;
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) out[r * pitch + c] = from_bf16(static_cast<const uint16_t*>(in)[r * stride + c]);
  }
  if (filled == pitch) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = filled; c < pitch; ++c) out[r * pitch + c] = 0.0f;
}

inline void write_rows(Type type, const float* in, int64_t pitch, int64_t rows, int64_t columns, void* out,
                       int64_t stride) {
  if (type == Type::f32) return copy_rows<false>(in, pitch, rows, columns, static_cast<float*>(out), stride);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) static_cast<uint16_t*>(out)[r * stride + c] = to_bf16(in[r * pitch + c]);
}

}  // namespace CTR_ISA
}  // namespace ctr
