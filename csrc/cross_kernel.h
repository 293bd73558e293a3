// The low-rank cross layer y = x0 * t + x, t = h V^T + b, h = x U^T, on tiles of rows whose h stays in the cache.
//
// Backward, g the gradient of y, with h and t again: a = g * x0, d = a V; dx0 = g * t; dx = g + d U; dV += a^T h;
// dU^T += x^T d; db += columnsum(a). x0 and x are all that is kept for it.
//
// Traffic, n = B W floats: forward 3 n (x0, x, y), backward 5 n (g, x0, x, dx0, dx): the floor. The weights, of rank R,
// stay in the cache. 4 n R FLOP forward, 12 n R backward.
#pragma once
#include "buffer.h"
#include "gemm.h"
#include "kernels.h"
#include "sums.h"

namespace ctr {
namespace CTR_ISA {

constexpr int64_t kCrossDepth = 512;  // columns summed at a time: their weights stay near, and so do rounding errors

// Columns [n, n + W) of a row of `width` floats without padding; what lies beyond is zero, and not written.
inline Vec load_part(const float* row, int64_t n, int64_t width) {
  if (n + W <= width) return load(row + n);
  Vec v = {};
  for (int64_t i = 0; n + i < width; ++i) v[i] = row[n + i];
  return v;
}
inline void store_part(float* row, int64_t n, int64_t width, Vec v) {
  if (n + W <= width) return store(row + n, v);
  for (int64_t i = 0; n + i < width; ++i) row[n + i] = v[i];
}

// y = x0 * (sum + bias) + x
struct StoreCross {
  float* y;
  const float *x0, *x, *bias;
  int64_t width;
  void operator()(int64_t m, int64_t n, Vec sum) const {
    const int64_t at = m * width;
    const Vec factor = load_part(x0 + at, n, width), rest = load_part(x + at, n, width);
    store_part(y + at, n, width, factor * (sum + load(bias + n)) + rest);
  }
};

// dx0 = g * (sum + bias)
struct StoreProduct {
  float* out;
  const float *grad, *bias;
  int64_t width;
  void operator()(int64_t m, int64_t n, Vec sum) const {
    const int64_t at = m * width;
    store_part(out + at, n, width, load_part(grad + at, n, width) * (sum + load(bias + n)));
  }
};

// dx = g + sum
struct StoreSum {
  float* out;
  const float* grad;
  int64_t width;
  void operator()(int64_t m, int64_t n, Vec sum) const {
    const int64_t at = m * width;
    store_part(out + at, n, width, load_part(grad + at, n, width) + sum);
  }
};

// out [rows, rp] = a [rows, width] b [width, rp], summed in blocks of the width.
inline void narrow(int64_t rows, int64_t rp, int64_t width, const float* a, int64_t pitch, const float* b, float* out) {
  for (int64_t c = 0; c < width; c += kCrossDepth) {
    const int64_t depth = width - c < kCrossDepth ? width - c : kCrossDepth;
    if (c == 0) gemm<Layout::rows>(rows, rp, depth, a, pitch, b, rp, Store{out, rp});
    else gemm<Layout::rows>(rows, rp, depth, a + c, pitch, b + c * rp, rp, Add{out, rp});
  }
}

inline void cross_forward(const CrossArgs& args, int64_t first, int64_t last) {
  const int64_t width = args.width, rp = args.rp;
  const Buffer hidden(kCrossTile * rp);
  for (int64_t row = first * kCrossTile; row < last * kCrossTile && row < args.rows; row += kCrossTile) {
    const int64_t rows = args.rows - row < kCrossTile ? args.rows - row : kCrossTile, at = row * width;
    narrow(rows, rp, width, args.x + at, width, args.ut, hidden.get());
    gemm<Layout::rows>(rows, args.wp, rp, hidden.get(), rp, args.vt, args.wp,
                       StoreCross{args.y + at, args.x0 + at, args.x + at, args.bias, width});
  }
}

inline void cross_backward(const CrossArgs& args, const CrossGradients& sums, int64_t first, int64_t last) {
  const int64_t width = args.width, wp = args.wp, rp = args.rp;
  const Buffer hidden(kCrossTile * rp), grad_hidden(kCrossTile * rp), product(kCrossTile * wp);
  for (int64_t row = first * kCrossTile; row < last * kCrossTile && row < args.rows; row += kCrossTile) {
    const int64_t rows = args.rows - row < kCrossTile ? args.rows - row : kCrossTile, at = row * width;
    const float *x0 = args.x0 + at, *x = args.x + at, *grad = args.grad + at;
    float *h = hidden.get(), *d = grad_hidden.get(), *a = product.get();
    for (int64_t m = 0; m < rows; ++m) {
      float* out = a + m * wp;
      for (int64_t c = 0; c < wp; c += W)
        store(out + c, load_part(grad + m * width, c, width) * load_part(x0 + m * width, c, width));
    }
    narrow(rows, rp, width, x, width, args.ut, h);
    narrow(rows, rp, width, a, wp, args.v, d);
    gemm<Layout::rows>(rows, wp, rp, h, rp, args.vt, wp, StoreProduct{args.grad_x0 + at, grad, args.bias, width});
    gemm<Layout::rows>(rows, wp, rp, d, rp, args.u, wp, StoreSum{args.grad_x + at, grad, width});
    gemm<Layout::transposed>(width, rp, rows, a, wp, h, rp, Add{sums.v, rp});
    gemm<Layout::transposed>(width, rp, rows, x, width, d, rp, Add{sums.ut, rp});
    add_columns(a, wp, rows, wp, sums.bias);
  }
}

}  // namespace CTR_ISA
}  // namespace ctr
