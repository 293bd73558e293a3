// A linear layer y = LN(x) W^T + b + residual on tiles of tokens, norm and residual optional, for widths of tens: there
// a tile and all weights fit the cache, and general matrix libraries reach half their rate or less.
//
// Backward, N = LN(x): dN = dY W; dW += dY^T N; db += columnsum(dY); dX from dN as in norm_kernel.h.
#pragma once
#include "buffer.h"
#include "gemm.h"
#include "kernels.h"
#include "norm_kernel.h"
#include "sums.h"

namespace ctr {
namespace CTR_ISA {

inline void linear_forward(const LinearArgs& args, int64_t first, int64_t last) {
  const Buffer normed(args.norm.gamma ? kLinearTile * args.in : 0);
  for (int64_t token = first * kLinearTile; token < last * kLinearTile && token < args.tokens; token += kLinearTile) {
    const int64_t left = args.tokens - token, rows = left < kLinearTile ? left : kLinearTile;
    const float* x = args.x + token * args.in;
    float* y = args.y + token * args.out;
    if (args.norm.gamma != nullptr) {
      normalise_rows(args.norm, x, rows, args.in, normed.get(), nullptr);
      x = normed.get();
    }
    if (args.residual != nullptr)
      gemm<Layout::rows>(rows, args.out, args.in, x, args.in, args.weight, args.out,
                         StoreResidual{y, args.out, args.bias, args.residual + token * args.out, args.around});
    else
      gemm<Layout::rows>(rows, args.out, args.in, x, args.in, args.weight, args.out,
                         StoreBiased{y, args.out, args.bias, args.around});
  }
  finish_streams();
}

inline void linear_backward(const LinearArgs& args, const LinearGradients& sums, int64_t first, int64_t last) {
  const bool norm = args.norm.gamma != nullptr;
  RowMoments kept[kLinearTile];
  const Buffer normed(norm ? kLinearTile * args.in : 0), grad(norm ? kLinearTile * args.in : 0);
  for (int64_t token = first * kLinearTile; token < last * kLinearTile && token < args.tokens; token += kLinearTile) {
    const int64_t left = args.tokens - token, rows = left < kLinearTile ? left : kLinearTile, at = token * args.in;
    const float *x = args.x + at, *gy = args.y + token * args.out;
    if (norm) normalise_rows(args.norm, x, rows, args.in, normed.get(), kept);
    if (norm || args.residual == nullptr)
      gemm<Layout::rows>(rows, args.in, args.out, gy, args.out, args.weight, args.in,
                         Store{norm ? grad.get() : args.grad_x + at, args.in, args.around && !norm});
    else
      gemm<Layout::rows>(rows, args.in, args.out, gy, args.out, args.weight, args.in,
                         StorePlus{args.grad_x + at, args.in, args.residual + at, args.around});
    gemm<Layout::transposed>(args.out, args.in, rows, gy, args.out, norm ? normed.get() : x, args.in,
                             Add{sums.weight, args.in});
    add_columns(gy, args.out, rows, args.out, sums.bias);
    if (norm)
      differentiate_rows(args.norm, x, kept, grad.get(), args.residual == nullptr ? nullptr : args.residual + at, rows,
                         args.in, args.grad_x + at, args.around, sums.gamma, sums.beta, normed.get());
  }
  finish_streams();
}

}  // namespace CTR_ISA
}  // namespace ctr
