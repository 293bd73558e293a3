// A linear layer with an optional LayerNorm before it and an optional residual after it, as parts of other operators.
#pragma once
#include "tensor_args.h"

namespace ctr {

// LN(x) weight^T + bias + residual: x [tokens, in], weight [out, in], bias [out], residual [tokens, out] or null.
Tensor linear(const Tensor& x, const NormArgs& norm, const Tensor& weight, const Tensor& bias, const Tensor* residual);

struct LinearGradientTensors {
  Tensor x, weight, bias, gamma, beta;  // gamma, beta: zero without a norm
};

// Its gradients; the gradient of x is that through the norm plus grad_residual [tokens, in], if any.
LinearGradientTensors linear_backward(const Tensor& grad_out, const Tensor& x, const NormArgs& norm,
                                      const Tensor& weight, const Tensor* grad_residual);

}  // namespace ctr
