// A linear layer y = LN(x) W^T + b + residual on tiles of tokens, norm and residual optional, for widths of tens and
// hundreds: there a tile and all weights fit the cache, and general matrix libraries reach half their rate or less.
//
// Backward, N = LN(x): dN = dY W; dW += dY^T N; db += columnsum(dY); dX from dN as in norm_kernel.h.
// Where a width is not whole vectors, rows pass through scratch with zeros behind them.
#pragma once
#include "buffer.h"
#include "convert.h"
#include "gemm.h"
#include "kernels.h"
#include "norm_kernel.h"
#include "sums.h"

namespace ctr {
namespace CTR_ISA {

// A tile's rows of `width` floats with pitch `padded`: in place where there is nothing to pad, else in the scratch.
inline const float* padded_rows(const float* from, int64_t rows, int64_t width, int64_t padded, float* scratch) {
  if (width == padded) return from;
  read_rows(Type::f32, from, width, rows, width, scratch, padded);
  return scratch;
}

// to [rows, width] = from [rows, padded] + residual [rows, width], none where null.
inline void add_rows(const float* from, int64_t padded, const float* residual, int64_t rows, int64_t width, float* to) {
  if (residual == nullptr) return write_rows(Type::f32, from, padded, rows, width, to, width);
  const int64_t whole = width / W * W, left = width - whole;
  for (int64_t r = 0; r < rows; ++r, from += padded, residual += width, to += width) {
    for (int64_t c = 0; c < whole; c += W) store(to + c, load(from + c) + load(residual + c));
    if (left != 0) store_part(to + whole, load(from + whole) + load_part(residual + whole, left), left);
  }
}

inline void linear_forward(const LinearArgs& args, int64_t first, int64_t last) {
  const bool norm = args.norm.gamma != nullptr, padded = args.out != args.out_p;
  const Buffer x_rows(norm && args.in != args.in_p ? kLinearTile * args.in_p : 0);
  const Buffer normed(norm ? kLinearTile * args.in_p : 0), y_rows(padded ? kLinearTile * args.out_p : 0);
  for (int64_t token = first * kLinearTile; token < last * kLinearTile && token < args.tokens; token += kLinearTile) {
    const int64_t left = args.tokens - token, rows = left < kLinearTile ? left : kLinearTile;
    const float *x = args.x + token * args.in, *residual = args.residual;
    float* y = args.y + token * args.out;
    int64_t pitch = args.in;
    if (residual != nullptr) residual += token * args.out;
    if (norm) {
      x = padded_rows(x, rows, args.in, args.in_p, x_rows.get());
      normalise_rows(args.norm, x, rows, args.in, args.in_p, normed.get(), nullptr);
      x = normed.get();
      pitch = args.in_p;
    }
    if (padded) {
      gemm<Layout::rows>(rows, args.out_p, args.in, x, pitch, args.weight, args.out_p,
                         StoreBiased{y_rows.get(), args.out_p, args.bias});
      add_rows(y_rows.get(), args.out_p, residual, rows, args.out, y);
    } else if (residual != nullptr) {
      gemm<Layout::rows>(rows, args.out, args.in, x, pitch, args.weight, args.out,
                         StoreResidual{y, args.out, args.bias, residual, args.around});
    } else {
      gemm<Layout::rows>(rows, args.out, args.in, x, pitch, args.weight, args.out,
                         StoreBiased{y, args.out, args.bias, args.around});
    }
  }
  finish_streams();
}

inline void linear_backward(const LinearArgs& args, const LinearGradients& sums, int64_t first, int64_t last) {
  const bool norm = args.norm.gamma != nullptr, padded = args.in != args.in_p;
  const int64_t pitch = args.in_p, size = kLinearTile * pitch;
  RowMoments kept[kLinearTile];
  const Buffer x_rows(padded ? size : 0), normed(norm ? size : 0), grad(norm || padded ? size : 0);
  for (int64_t token = first * kLinearTile; token < last * kLinearTile && token < args.tokens; token += kLinearTile) {
    const int64_t left = args.tokens - token, rows = left < kLinearTile ? left : kLinearTile, at = token * args.in;
    const float* const x = padded_rows(args.x + at, rows, args.in, pitch, x_rows.get());
    const float *gy = args.y + token * args.out, *residual = args.residual == nullptr ? nullptr : args.residual + at;
    float* const grad_x = args.grad_x + at;
    if (norm) normalise_rows(args.norm, x, rows, args.in, pitch, normed.get(), kept);
    if (norm || padded)
      gemm<Layout::rows>(rows, pitch, args.out, gy, args.out, args.weight, pitch, Store{grad.get(), pitch});
    else if (residual == nullptr)
      gemm<Layout::rows>(rows, pitch, args.out, gy, args.out, args.weight, pitch, Store{grad_x, pitch, args.around});
    else
      gemm<Layout::rows>(rows, pitch, args.out, gy, args.out, args.weight, pitch,
                         StorePlus{grad_x, pitch, residual, args.around});
    gemm<Layout::transposed>(args.out, pitch, rows, gy, args.out, norm ? normed.get() : x, pitch,
                             Add{sums.weight, pitch});
    add_columns(gy, args.out, rows, args.out, sums.bias);
    if (norm && !padded)
      differentiate_rows(args.norm, x, kept, grad.get(), residual, rows, args.in, pitch, grad_x, args.around, sums.gamma,
                         sums.beta, normed.get());
    else if (norm)
      differentiate_rows(args.norm, x, kept, grad.get(), nullptr, rows, args.in, pitch, grad.get(), false, sums.gamma,
                         sums.beta, normed.get());
    if (padded) add_rows(grad.get(), pitch, residual, rows, args.in, grad_x);
  }
  finish_streams();
}

}  // namespace CTR_ISA
}  // namespace ctr
