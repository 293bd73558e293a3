// Column sums of a tile of rows.
#pragma once
#include "simd.h"

namespace ctr {
namespace CTR_ISA {

constexpr int64_t kSumRows = 8;  // column sums are taken in blocks, so that rounding errors do not pile up

// sums[0..columns) += the column sums of rows [rows, pitch]; sums has whole vectors, of which the rest stays as it is.
inline void add_columns(const float* in, int64_t pitch, int64_t rows, int64_t columns, float* sums) {
  for (int64_t c = 0; c + W <= columns; c += W) {
    Vec sum = {};
    for (int64_t r = 0; r < rows; r += kSumRows) {
      Vec block = {};
      for (int64_t i = r; i < rows && i < r + kSumRows; ++i) block += load(in + i * pitch + c);
      sum += block;
    }
    store(sums + c, load(sums + c) + sum);
  }
  const int64_t left = columns % W, c = columns - left;
  if (left == 0) return;
  Vec sum = {};
  for (int64_t r = 0; r < rows; r += kSumRows) {
    Vec block = {};
    for (int64_t i = r; i < rows && i < r + kSumRows; ++i) block += load_part(in + i * pitch + c, left);
    sum += block;
  }
  store(sums + c, load(sums + c) + sum);
}

}  // namespace CTR_ISA
}  // namespace ctr
