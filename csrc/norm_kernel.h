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

inline RowMoments moments(const float* x, int64_t width, float eps) {
  Vec sum = {};
  for (int64_t c = 0; c < width; c += W) sum += load(x + c);
  const float mean = sum_lanes(sum)[0] / static_cast<float>(width);  // one division: those of whole vectors are slow
  Vec squares = {};
  for (int64_t c = 0; c < width; c += W) {
    const Vec off = load(x + c) - mean;
    squares += off * off;
  }
  const float variance = sum_lanes(squares)[0] / static_cast<float>(width);
  return {mean, (1.0f + (variance - variance)) / std::sqrt(variance + eps)};  // NaN, not 0, where it overflows
}

// out [rows, width] = LN(x [rows, width]); width is a multiple of W. kept [rows]: the rows' moments, or null.
inline void normalise_rows(const NormArgs& norm, const float* x, int64_t rows, int64_t width, float* out,
                           RowMoments* kept) {
  for (int64_t r = 0; r < rows; ++r, x += width, out += width) {
    const RowMoments m = moments(x, width, norm.eps);
    if (kept != nullptr) kept[r] = m;
    for (int64_t c = 0; c < width; c += W)
      store(out + c, (load(x + c) - m.mean) * m.rstd * load(norm.gamma + c) + load(norm.beta + c));
  }
}

// grad [rows, width], dN, becomes dX + residual (none where null); gamma and beta [width] gain their sums. kept: what
// normalise_rows kept of x.
inline void differentiate_rows(const NormArgs& norm, const float* x, const RowMoments* kept, const float* grad,
                               const float* residual, int64_t rows, int64_t width, float* out, bool around,
                               float* gamma_sums, float* beta_sums, float* scratch) {
  add_columns(grad, width, rows, width, beta_sums);
  for (int64_t r = 0; r < rows; ++r) {
    const float *from = x + r * width, *g = grad + r * width;
    const RowMoments m = kept[r];
    Vec sum = {}, product = {};
    for (int64_t c = 0; c < width; c += W) {
      const Vec h = (load(from + c) - m.mean) * m.rstd, scaled = load(g + c) * load(norm.gamma + c);
      sum += scaled;
      product += scaled * h;
      store(scratch + r * width + c, load(g + c) * h);
    }
    const float mean = sum_lanes(sum)[0] / static_cast<float>(width);
    const float share = sum_lanes(product)[0] / static_cast<float>(width);
    for (int64_t c = 0; c < width; c += W) {
      const Vec h = (load(from + c) - m.mean) * m.rstd, scaled = load(g + c) * load(norm.gamma + c);
      const Vec dx = (scaled - mean - h * share) * m.rstd;
      put(out + r * width + c, residual == nullptr ? dx : dx + load(residual + r * width + c), around);
    }
  }
  add_columns(scratch, width, rows, width, gamma_sums);
}

}  // namespace CTR_ISA
}  // namespace ctr
