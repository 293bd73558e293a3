// The linear layers of ctr::attention_block; see linear.h.
#include "linear.h"

#include <cstring>

namespace ctr {
namespace {

LinearArgs linear_args(const Tensor& x, const NormArgs& norm, const Tensor& weight) {
  for (const Tensor* t : {&x, &weight}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->is_contiguous(),
                    "x is [tokens, in] and weight [out, in], both float32 and contiguous");
  }
  LinearArgs args{};
  args.tokens = x.size(0);
  args.in = x.size(1);
  args.out = weight.size(0);
  check_shape(weight, {args.out, args.in}, "weight");
  STD_TORCH_CHECK(args.in > 0 && args.in % 16 == 0 && args.out > 0 && args.out % 16 == 0, "widths ", args.in, " and ",
                  args.out, " must be multiples of 16");
  args.x = static_cast<const float*>(x.const_data_ptr());
  args.norm = norm;
  return args;
}

}  // namespace

Tensor linear(const Tensor& x, const NormArgs& norm, const Tensor& weight, const Tensor& bias,
              const Tensor* residual) {
  LinearArgs args = linear_args(x, norm, weight);
  check_type(bias, ScalarType::Float, "bias");
  check_shape(bias, {args.out}, "bias");
  if (residual != nullptr) args.residual = floats(*residual, {args.tokens, args.out}, "residual");
  const float* w = static_cast<const float*>(weight.const_data_ptr());
  std::vector<float> transposed(args.in * args.out);
  transpose_into(w, args.out, args.in, args.in, transposed.data(), args.out);
  const Tensor bias_row = torch::stable::contiguous(bias);
  Tensor y = new_output({args.tokens, args.out}, ScalarType::Float);
  args.weight = transposed.data();
  args.bias = static_cast<const float*>(bias_row.const_data_ptr());
  args.y = static_cast<float*>(y.mutable_data_ptr());
  args.around = streams(y);
  const KernelTable& kernels = kernels_for(16);
  torch::stable::parallel_for(0, (args.tokens + kLinearTile - 1) / kLinearTile, 1, [&](int64_t first, int64_t last) {
    kernels.linear_forward(args, first, last);
  });
  return y;
}

// Summed in tasks whose number does not depend on the threads.
LinearGradientTensors linear_backward(const Tensor& grad_out, const Tensor& x, const NormArgs& norm,
                                      const Tensor& weight, const Tensor* grad_residual) {
  constexpr int64_t kTasks = 32;
  LinearArgs args = linear_args(x, norm, weight);
  args.y = const_cast<float*>(floats(grad_out, {args.tokens, args.out}, "grad_out"));
  if (grad_residual != nullptr) args.residual = floats(*grad_residual, {args.tokens, args.in}, "grad_residual");
  Tensor grad_x = new_output({args.tokens, args.in}, ScalarType::Float);
  args.weight = static_cast<const float*>(weight.const_data_ptr());
  args.grad_x = static_cast<float*>(grad_x.mutable_data_ptr());
  args.around = streams(grad_x);
  const int64_t tiles = (args.tokens + kLinearTile - 1) / kLinearTile, tasks = tiles < kTasks ? tiles : kTasks;
  const int64_t matrix = args.out * args.in, size = matrix + args.out + 2 * args.in;  // of one task's sums
  Tensor sums = new_output({tasks, size}, ScalarType::Float);
  float* data = static_cast<float*>(sums.mutable_data_ptr());
  const KernelTable& kernels = kernels_for(16);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      float *own = data + task * size, *rows = own + matrix;
      std::memset(own, 0, size * sizeof(float));
      const LinearGradients gradients{own, rows, rows + args.out, rows + args.out + args.in};
      kernels.linear_backward(args, gradients, tiles * task / tasks, tiles * (task + 1) / tasks);
    }
  });
  LinearGradientTensors result{grad_x,
                               torch::stable::empty({args.out, args.in}, ScalarType::Float),
                               torch::stable::empty({args.out}, ScalarType::Float),
                               torch::stable::empty({args.in}, ScalarType::Float),
                               torch::stable::empty({args.in}, ScalarType::Float)};
  int64_t offset = 0;
  for (Tensor* t : {&result.weight, &result.bias, &result.gamma, &result.beta}) {
    float* to = static_cast<float*>(t->mutable_data_ptr());
    std::memset(to, 0, t->numel() * sizeof(float));
    for (int64_t task = 0; task < tasks; ++task)
      for (int64_t i = 0; i < t->numel(); ++i) to[i] += data[task * size + offset + i];
    offset += t->numel();
  }
  return result;
}

}  // namespace ctr
