// A linear layer y = x W^T + b on tiles of tokens, for widths of tens: there a tile and all weights fit the cache, and
// general matrix libraries reach half their rate or less.
//
// Backward: dX = dY W; dW += dY^T X; db += columnsum(dY).
#pragma once
#include "gemm.h"
#include "kernels.h"
#include "sums.h"

namespace ctr {
namespace CTR_ISA {

inline void linear_forward(const LinearArgs& args, int64_t first, int64_t last) {
  for (int64_t token = first * kLinearTile; token < last * kLinearTile && token < args.tokens; token += kLinearTile) {
    const int64_t left = args.tokens - token, rows = left < kLinearTile ? left : kLinearTile;
    gemm<Layout::rows>(rows, args.out, args.in, args.x + token * args.in, args.in, args.weight, args.out,
                       StoreBiased{args.y + token * args.out, args.out, args.bias});
  }
}

inline void linear_backward(const LinearArgs& args, float* grad_weight, float* grad_bias, int64_t first,
                            int64_t last) {
  for (int64_t token = first * kLinearTile; token < last * kLinearTile && token < args.tokens; token += kLinearTile) {
    const int64_t left = args.tokens - token, rows = left < kLinearTile ? left : kLinearTile;
    const float *x = args.x + token * args.in, *gy = args.y + token * args.out;
    gemm<Layout::rows>(rows, args.in, args.out, gy, args.out, args.weight, args.in,
                       Store{args.grad_x + token * args.in, args.in});
    gemm<Layout::transposed>(args.out, args.in, rows, gy, args.out, x, args.in, Add{grad_weight, args.in});
    add_columns(gy, args.out, rows, args.out, grad_bias);
  }
}

}  // namespace CTR_ISA
}  // namespace ctr
