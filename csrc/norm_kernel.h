// LayerNorm of a tile of rows that stays in the cache: n = (x - mean) rstd gamma + beta.
//
// Backward, with h = (x - mean) rstd and g = dN * gamma: dX = rstd (g - rowmean(g) - h rowmean(g h));
// dgamma += columnsum(dN * h); dbeta += columnsum(dN). Nothing but x is kept for it.
#pragma once
#include <cmath>

#include "kernels.h"
#include "sums.h"

namespace ctr {
namespace CTR_ISA {

struct RowMoments {
  float mean, rstd;
};

// A vector of a row of which `left` floats count; the others are 0.
inline Vec first_lanes(Vec v, int64_t left) { return lane_index() < static_cast<int32_t>(left) ? v : Vec{}; }

// Of width floats; what lies between them and the next multiple of W is read and does not count.
inline RowMoments moments(const float* x, int64_t width, float eps) {
  const int64_t whole = width / W * W, left = width - whole;
  Vec sum = {};
  for (int64_t c = 0; c < whole; c += W) sum += load(x + c);
  if (left != 0) sum += first_lanes(load(x + whole), left);
  const float mean = sum_lanes(sum)[0] / static_cast<float>(width);  // one division: those of whole vectors are slow
  Vec squares = {};
  for (int64_t c = 0; c < whole; c += W) {
    const Vec off = load(x + c) - mean;
    squares += off * off;
  }
  if (left != 0) {
    const Vec off = first_lanes(load(x + whole) - mean, left);
    squares += off * off;
  }
  const float variance = sum_lanes(squares)[0] / static_cast<float>(width);
  return {mean, (1.0f + (variance - variance)) / std::sqrt(variance + eps)};  // NaN, not 0, where it overflows
}

// out [rows, width] = LN(x [rows, width]); rows lie `pitch` floats apart, a multiple of W, and so many does the norm
// have, zero from width on: there out is 0. kept [rows]: the rows' moments, or null.
inline void normalise_rows(const NormArgs& norm, const float* x, int64_t rows, int64_t width, int64_t pitch, float* out,
                           RowMoments* kept) {
  for (int64_t r = 0; r < rows; ++r, x += pitch, out += pitch) {
    const RowMoments m = moments(x, width, norm.eps);
    if (kept != nullptr) kept[r] = m;
    for (int64_t c = 0; c < pitch; c += W)
      store(out + c, (load(x + c) - m.mean) * m.rstd * load(norm.gamma + c) + load(norm.beta + c));
  }
}
inline void normalise_rows(const NormArgs& norm, const float* x, int64_t rows, int64_t width, float* out,
                           RowMoments* kept) {
  normalise_rows(norm, x, rows, width, width, out, kept);
}

// grad [rows, width], dN, becomes dX + residual (none where null); gamma and beta [pitch] gain their sums. kept: what
// normalise_rows kept of x. From width on grad is 0, and out is not meant.
inline void differentiate_rows(const NormArgs& norm, const float* x, const RowMoments* kept, const float* grad,
                               const float* residual, int64_t rows, int64_t width, int64_t pitch, float* out,
                               bool around, float* gamma_sums, float* beta_sums, float* scratch) {
  add_columns(grad, pitch, rows, pitch, beta_sums);
  for (int64_t r = 0; r < rows; ++r) {
    const float *from = x + r * pitch, *g = grad + r * pitch;
    const RowMoments m = kept[r];
    Vec sum = {}, product = {};
    for (int64_t c = 0; c < pitch; c += W) {
      const Vec h = (load(from + c) - m.mean) * m.rstd, scaled = load(g + c) * load(norm.gamma + c);
      sum += scaled;
      product += scaled * h;
      store(scratch + r * pitch + c, load(g + c) * h);
    }
    const float mean = sum_lanes(sum)[0] / static_cast<float>(width);
    const float share = sum_lanes(product)[0] / static_cast<float>(width);
    for (int64_t c = 0; c < pitch; c += W) {
      const Vec h = (load(from + c) - m.mean) * m.rstd, scaled = load(g + c) * load(norm.gamma + c);
      const Vec dx = (scaled - mean - h * share) * m.rstd;
      put(out + r * pitch + c, residual == nullptr ? dx : dx + load(residual + r * pitch + c), around);
    }
  }
  add_columns(scratch, pitch, rows, pitch, gamma_sums);
}
inline void differentiate_rows(const NormArgs& norm, const float* x, const RowMoments* kept, const float* grad,
                               const float* residual, int64_t rows, int64_t width, float* out, bool around,
                               float* gamma_sums, float* beta_sums, float* scratch) {
  differentiate_rows(norm, x, kept, grad, residual, rows, width, width, out, around, gamma_sums, beta_sums, scratch);
}

}  // namespace CTR_ISA
}  // namespace ctr
