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

constexpr int64_t kCrossDepth = 256;  // columns summed at a time: their weights stay near, and so do rounding errors

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

// The same place of a row in the panel of columns that comes next: a panel takes a few lines from each of many rows, a
// pattern that the hardware does not foresee.
inline void prefetch_panel(const float* p) { __builtin_prefetch(p + kTileVectors * W, 0, 2); }

// y = x0 * (sum + bias) + x
struct StoreCross {
  float* y;
  const float *x0, *x, *bias;
  int64_t width;
  void operator()(int64_t m, int64_t n, Vec sum) const {
    const int64_t at = m * width;
    prefetch_panel(x0 + at + n);
    prefetch_panel(x + at + n);
    prefetch_panel(y + at + n);
    const Vec factor = load_part(x0 + at, n, width), rest = load_part(x + at, n, width);
    store_part(y + at, n, width, factor * (sum + load(bias + n)) + rest);
  }
};

// dx0 = g * (sum + bias)
struct StoreProduct {
  float* out;
  const float *grad, *bias;
  int64_t pitch, width;  // width: columns from here on
  void operator()(int64_t m, int64_t n, Vec sum) const {
    const int64_t at = m * pitch;
    prefetch_panel(out + at + n);
    store_part(out + at, n, width, load_part(grad + at, n, width) * (sum + load(bias + n)));
  }
};

// dx = g + sum
struct StoreSum {
  float* out;
  const float* grad;
  int64_t pitch, width;
  void operator()(int64_t m, int64_t n, Vec sum) const {
    const int64_t at = m * pitch;
    prefetch_panel(out + at + n);
    store_part(out + at, n, width, load_part(grad + at, n, width) + sum);
  }
};

// out = sum where it is the first, else out += sum.
struct Accumulate {
  float* out;
  int64_t pitch;
  bool first;
  void operator()(int64_t m, int64_t n, Vec sum) const {
    float* const to = out + m * pitch + n;
    store(to, first ? sum : load(to) + sum);
  }
};

// out [rows, rp] = a [rows, width] b [width, rp], summed in blocks of the width.
inline void narrow(int64_t rows, int64_t rp, int64_t width, const float* a, int64_t pitch, const float* b, float* out) {
  for (int64_t c = 0; c < width; c += kCrossDepth) {
    const int64_t depth = width - c < kCrossDepth ? width - c : kCrossDepth;
    gemm<Layout::rows>(rows, rp, depth, a + c, pitch, b + c * rp, rp, Accumulate{out, rp, c == 0});
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

// out [rows, pitch] = a * b for `columns` columns of two [rows, width] tensors, zero beyond up to a multiple of 16.
inline void multiply_rows(const float* a, const float* b, int64_t rows, int64_t width, int64_t columns, float* out,
                          int64_t pitch) {
  for (int64_t m = 0; m < rows; ++m, a += width, b += width, out += pitch)
    for (int64_t c = 0; c < (columns + 15) / 16 * 16; c += W) {
      prefetch_panel(a + c);
      prefetch_panel(b + c);
      store(out + c, load_part(a, c, columns) * load_part(b, c, columns));
    }
}

// First h and d, sums over the whole width, then all else for 64 columns at a time, so that what several products need
// comes to the first-level cache once. A tile's share of the weights' sums is as large as the weights, hence its many
// rows.
inline void cross_backward(const CrossArgs& args, const CrossGradients& sums, int64_t first, int64_t last) {
  constexpr int64_t kTile = kCrossBackwardTile, kColumns = 64;
  const int64_t width = args.width, wp = args.wp, rp = args.rp;
  const Buffer hidden(kTile * rp), grad_hidden(kTile * rp), product(kTile * kCrossDepth);
  float *const h = hidden.get(), *const d = grad_hidden.get(), *const a = product.get();
  for (int64_t row = first * kTile; row < last * kTile && row < args.rows; row += kTile) {
    const int64_t rows = args.rows - row < kTile ? args.rows - row : kTile, at = row * width;
    const bool start = row == first * kTile;
    for (int64_t c = 0; c < width; c += kCrossDepth) {
      const int64_t depth = width - c < kCrossDepth ? width - c : kCrossDepth;
      multiply_rows(args.grad + at + c, args.x0 + at + c, rows, width, depth, a, kCrossDepth);
      gemm<Layout::rows>(rows, rp, depth, args.x + at + c, width, args.ut + c * rp, rp, Accumulate{h, rp, c == 0});
      gemm<Layout::rows>(rows, rp, depth, a, Constant<kCrossDepth>{}, args.v + c * rp, rp, Accumulate{d, rp, c == 0});
    }
    for (int64_t c = 0; c < width; c += kColumns) {
      const int64_t left = width - c, columns = left < kColumns ? left : kColumns, padded = (columns + 15) / 16 * 16;
      const float *x = args.x + at + c, *grad = args.grad + at + c;
      multiply_rows(grad, args.x0 + at + c, rows, width, columns, a, kColumns);
      gemm<Layout::rows>(rows, padded, rp, h, rp, args.vt + c, wp,
                         StoreProduct{args.grad_x0 + at + c, grad, args.bias + c, width, left});
      gemm<Layout::rows>(rows, padded, rp, d, rp, args.u + c, wp, StoreSum{args.grad_x + at + c, grad, width, left});
      gemm<Layout::transposed>(columns, rp, rows, a, Constant<kColumns>{}, h, rp, Accumulate{sums.v + c * rp, rp, start});
      gemm<Layout::transposed>(columns, rp, rows, x, width, d, rp, Accumulate{sums.ut + c * rp, rp, start});
      if (start)
        for (int64_t i = 0; i < padded; ++i) sums.bias[c + i] = 0.0f;
      add_columns(a, kColumns, rows, padded, sums.bias + c);
    }
  }
}

}  // namespace CTR_ISA
}  // namespace ctr
