// ctr::linear and its backward on CPUs: the projections of the transformer layer.
#include <cstring>
#include <tuple>

#include "tensor_args.h"

namespace ctr {
namespace {

LinearArgs linear_args(const Tensor& x, const Tensor& weight) {
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
  return args;
}

}  // namespace

// x [tokens, in], weight [out, in], bias [out] -> [tokens, out].
Tensor linear(Tensor x, Tensor weight, Tensor bias) {
  LinearArgs args = linear_args(x, weight);
  check_type(bias, ScalarType::Float, "bias");
  check_shape(bias, {args.out}, "bias");
  const float* w = static_cast<const float*>(weight.const_data_ptr());
  std::vector<float> transposed(args.in * args.out);
  for (int64_t o = 0; o < args.out; ++o)
    for (int64_t i = 0; i < args.in; ++i) transposed[i * args.out + o] = w[o * args.in + i];
  const Tensor bias_row = torch::stable::contiguous(bias);
  Tensor y = new_output({args.tokens, args.out}, ScalarType::Float);
  args.weight = transposed.data();
  args.bias = static_cast<const float*>(bias_row.const_data_ptr());
  args.y = static_cast<float*>(y.mutable_data_ptr());
  const KernelTable& kernels = kernels_for(16);
  torch::stable::parallel_for(0, (args.tokens + kLinearTile - 1) / kLinearTile, 1, [&](int64_t first, int64_t last) {
    kernels.linear_forward(args, first, last);
  });
  return y;
}

// Gradients of x, weight and bias; summed in tasks whose number does not depend on the threads.
std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor grad_out, Tensor x, Tensor weight) {
  constexpr int64_t kTasks = 32;
  LinearArgs args = linear_args(x, weight);
  check_type(grad_out, ScalarType::Float, "grad_out");
  check_shape(grad_out, {args.tokens, args.out}, "grad_out");
  STD_TORCH_CHECK(grad_out.is_contiguous(), "grad_out must be contiguous");
  Tensor grad_x = new_output({args.tokens, args.in}, ScalarType::Float);
  args.weight = static_cast<const float*>(weight.const_data_ptr());
  args.y = const_cast<float*>(static_cast<const float*>(grad_out.const_data_ptr()));
  args.grad_x = static_cast<float*>(grad_x.mutable_data_ptr());
  const int64_t tiles = (args.tokens + kLinearTile - 1) / kLinearTile, tasks = tiles < kTasks ? tiles : kTasks;
  const int64_t matrix = args.out * args.in, size = matrix + args.out;  // of one task's sums
  Tensor sums = new_output({tasks, size}, ScalarType::Float);
  float* data = static_cast<float*>(sums.mutable_data_ptr());
  const KernelTable& kernels = kernels_for(16);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      float* own = data + task * size;
      std::memset(own, 0, size * sizeof(float));
      kernels.linear_backward(args, own, own + matrix, tiles * task / tasks, tiles * (task + 1) / tasks);
    }
  });
  Tensor grad_weight = torch::stable::empty({args.out, args.in}, ScalarType::Float);
  Tensor grad_bias = torch::stable::empty({args.out}, ScalarType::Float);
  float* to[] = {static_cast<float*>(grad_weight.mutable_data_ptr()), static_cast<float*>(grad_bias.mutable_data_ptr())};
  std::memset(to[0], 0, matrix * sizeof(float));
  std::memset(to[1], 0, args.out * sizeof(float));
  for (int64_t task = 0; task < tasks; ++task) {
    const float* own = data + task * size;
    for (int64_t i = 0; i < matrix; ++i) to[0][i] += own[i];
    for (int64_t i = 0; i < args.out; ++i) to[1][i] += own[matrix + i];
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace ctr
