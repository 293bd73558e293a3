// ctr::ffn and its backward on CPUs: weights packed once a call, tiles shared among threads.
#include <cstring>
#include <tuple>

#include "aligned.h"
#include "tensor_args.h"

namespace ctr {
namespace {

// A bf16 or fp32 tensor as fp32, contiguous.
class Floats {
 public:
  explicit Floats(const Tensor& t)
      : tensor_(torch::stable::contiguous(torch::stable::to(t, ScalarType::Float))),
        data_(static_cast<const float*>(tensor_.const_data_ptr())) {}
  float operator[](int64_t i) const { return data_[i]; }

 private:
  Tensor tensor_;
  const float* data_;
};

struct Packed {
  AlignedFloats w1t, b1, w2t, b2, w1, w2;  // padded with zeros
};

// Without b2, which stays zero.
Packed pack(const FfnArgs& args, const Floats& w1, const Floats& b1, const Floats& w2, bool backward) {
  const int64_t dim = args.dim, dp = args.dp, hidden = args.hidden, padded = args.slices * kFfnSlice;
  Packed p;
  p.w1t = AlignedFloats::zeros(padded * dim);
  p.b1 = AlignedFloats::zeros(padded);
  p.b2 = AlignedFloats::zeros(dp);
  if (backward) {
    p.w1 = AlignedFloats::zeros(padded * dp);
    p.w2 = AlignedFloats::zeros(padded * dim);
  } else {
    p.w2t = AlignedFloats::zeros(padded * dp);
  }
  for (int64_t h = 0; h < hidden; ++h) {
    p.b1[h] = b1[h];
    const int64_t slice = h / kFfnSlice, unit = h % kFfnSlice;
    for (int64_t d = 0; d < dim; ++d) {
      p.w1t[(slice * dim + d) * kFfnSlice + unit] = w1[h * dim + d];
      if (backward) {
        p.w1[h * dp + d] = w1[h * dim + d];
        p.w2[(slice * dim + d) * kFfnSlice + unit] = w2[d * hidden + h];
      } else {
        p.w2t[h * dp + d] = w2[d * hidden + h];
      }
    }
  }
  return p;
}

FfnArgs ffn_args(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, int64_t activation,
                 double dropout_p, const std::optional<Tensor>& seed) {
  FfnArgs args{};
  args.type = type_of(x, "x");
  STD_TORCH_CHECK(x.dim() == 2 && w1.dim() == 2, "x is [tokens, D] and w1 [hidden, D]");
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  const int64_t dim = x.size(1), hidden = w1.size(0);
  check_shape(w1, {hidden, dim}, "w1");
  check_shape(b1, {hidden}, "b1");
  check_shape(w2, {dim, hidden}, "w2");
  for (const Tensor* t : {&w1, &b1, &w2}) check_type(*t, x.scalar_type(), "a weight");
  STD_TORCH_CHECK(dim >= 1 && hidden >= 8 && hidden % 8 == 0, "hidden=", hidden,
                  "; a positive multiple of 8 is needed");
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation=", activation, "; 0, 1 and 2 are known");
  args.activation = static_cast<Activation>(activation);
  args.tokens = x.size(0);
  args.dim = dim;
  args.dp = (dim + 15) / 16 * 16;
  args.hidden = hidden;
  args.slices = (hidden + kFfnSlice - 1) / kFfnSlice;
  args.dropout = dropout_args(dropout_p, seed);
  args.x = x.const_data_ptr();
  return args;
}

void use(FfnArgs& args, const Packed& p) {
  args.w1t = p.w1t.data();
  args.b1 = p.b1.data();
  args.w2t = p.w2t.data();
  args.b2 = p.b2.data();
  args.w1 = p.w1.data();
  args.w2 = p.w2.data();
}

// ffn_args with the norm of half a layer: 0 none, 1 x + ffn(LN(x)), 3 n + ffn(n) with n = LN(x).
FfnArgs normed_args(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, int64_t norm,
                    double eps, int64_t activation, double dropout_p, const std::optional<Tensor>& seed) {
  FfnArgs args = ffn_args(x, w1, b1, w2, activation, dropout_p, seed);
  if (norm == 0) return args;
  STD_TORCH_CHECK(norm == 1 || norm == 3, "norm=", norm, "; 0, 1 and 3 are known here");
  STD_TORCH_CHECK(norm_weight.has_value() && norm_bias.has_value(), "norm=", norm, " needs a weight and a bias");
  STD_TORCH_CHECK(args.type == Type::f32 && args.dp == args.dim, "D=", args.dim,
                  "; a float32 x and a multiple of 16 are needed");
  args.norm = norm_args(*norm_weight, *norm_bias, eps, args.dim);
  args.normed_residual = norm == 3;
  return args;
}

// y of args.x.
Tensor forward(FfnArgs& args, const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
               const Tensor& b2) {
  const Floats bias(b2);
  check_shape(b2, {args.dim}, "b2");
  check_type(b2, x.scalar_type(), "b2");
  const Packed packed = pack(args, Floats(w1), Floats(b1), Floats(w2), false);
  for (int64_t d = 0; d < args.dim; ++d) packed.b2[d] = bias[d];
  use(args, packed);
  Tensor out = new_output({args.tokens, args.dim}, x.scalar_type());
  args.out = out.mutable_data_ptr();
  const KernelTable& kernels = kernels_for(args.dp);
  torch::stable::parallel_for(0, (args.tokens + kFfnTile - 1) / kFfnTile, 1, [&](int64_t first, int64_t last) {
    kernels.ffn_forward(args, first, last);
  });
  return out;
}

struct Gradients {
  Tensor x, w1, b1, w2, b2, norm;
};

// The tokens are cut into a number of tasks that does not depend on the threads, each
// with sums of its own, so that the result does not either.
Gradients backward(FfnArgs& args, const Tensor& grad_out, const Tensor& x, const Tensor& w1, const Tensor& b1,
                   const Tensor& w2) {
  constexpr int64_t kTasks = 32;
  check_shape(grad_out, {args.tokens, args.dim}, "grad_out");
  check_type(grad_out, x.scalar_type(), "grad_out");
  STD_TORCH_CHECK(grad_out.is_contiguous(), "grad_out must be contiguous");
  const Packed packed = pack(args, Floats(w1), Floats(b1), Floats(w2), true);
  use(args, packed);
  args.grad_out = grad_out.const_data_ptr();
  Tensor gx = new_output({args.tokens, args.dim}, x.scalar_type());
  args.out = gx.mutable_data_ptr();

  const int64_t dim = args.dim, dp = args.dp, hidden = args.hidden, padded = args.slices * kFfnSlice;
  const int64_t tiles = (args.tokens + kFfnTile - 1) / kFfnTile, tasks = tiles < kTasks ? tiles : kTasks;
  const int64_t matrix = padded * dp, size = 2 * matrix + padded + 3 * dp;  // of a task's sums
  Tensor sums = new_output({tasks, size}, ScalarType::Float);
  float* data = static_cast<float*>(sums.mutable_data_ptr());
  const KernelTable& kernels = kernels_for(dp);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      float* own = data + task * size;
      std::memset(own, 0, size * sizeof(float));
      float* rows = own + 2 * matrix;
      const FfnGradients gradients{own, own + matrix, rows, rows + padded, rows + padded + dp, rows + padded + 2 * dp};
      kernels.ffn_backward(args, gradients, tiles * task / tasks, tiles * (task + 1) / tasks);
    }
  });

  const ScalarType f32 = ScalarType::Float;
  Tensor gw1 = torch::stable::empty({hidden, dim}, f32), gb1 = torch::stable::empty({hidden}, f32);
  Tensor gw2 = torch::stable::empty({dim, hidden}, f32), gb2 = torch::stable::empty({dim}, f32);
  float *to_w1 = static_cast<float*>(gw1.mutable_data_ptr()), *to_b1 = static_cast<float*>(gb1.mutable_data_ptr());
  float *to_w2 = static_cast<float*>(gw2.mutable_data_ptr()), *to_b2 = static_cast<float*>(gb2.mutable_data_ptr());
  torch::stable::parallel_for(0, hidden, 16, [&](int64_t first, int64_t last) {
    std::vector<float> row(2 * dp + 1);
    for (int64_t h = first; h < last; ++h) {
      std::fill(row.begin(), row.end(), 0.0f);
      for (int64_t task = 0; task < tasks; ++task) {
        const float* own = data + task * size;
        for (int64_t d = 0; d < dim; ++d) row[d] += own[h * dp + d];
        for (int64_t d = 0; d < dim; ++d) row[dp + d] += own[matrix + h * dp + d];
        row[2 * dp] += own[2 * matrix + h];
      }
      std::memcpy(to_w1 + h * dim, row.data(), dim * sizeof(float));
      for (int64_t d = 0; d < dim; ++d) to_w2[d * hidden + h] = row[dp + d];
      to_b1[h] = row[2 * dp];
    }
  });
  const bool normed = args.norm.gamma != nullptr;
  Tensor norm = normed ? torch::stable::empty({2, dim}, f32) : torch::stable::empty({0}, f32);
  float* to_norm = normed ? static_cast<float*>(norm.mutable_data_ptr()) : nullptr;
  for (int64_t d = 0; d < dim; ++d) {
    float sums_of[3] = {};
    for (int64_t task = 0; task < tasks; ++task)
      for (int i = 0; i < 3; ++i) sums_of[i] += data[task * size + 2 * matrix + padded + i * dp + d];
    to_b2[d] = sums_of[0];
    if (normed) {
      to_norm[d] = sums_of[1];
      to_norm[dim + d] = sums_of[2];
    }
  }
  const auto typed = [&](Tensor& t) { return torch::stable::to(t, x.scalar_type()); };
  return {gx, typed(gw1), typed(gb1), typed(gw2), typed(gb2), norm};
}

}  // namespace

std::tuple<Tensor, Tensor> ffn(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2,
                               std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, int64_t norm,
                               double eps, int64_t activation, double dropout_p, std::optional<Tensor> seed) {
  FfnArgs args =
      normed_args(x, w1, b1, w2, norm_weight, norm_bias, norm, eps, activation, dropout_p, seed);
  return {forward(args, x, w1, b1, w2, b2), torch::stable::empty({0}, x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_backward(
    Tensor grad_out, Tensor x, std::optional<Tensor> z, Tensor w1, Tensor b1, Tensor w2,
    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, int64_t norm, double eps, int64_t activation,
    double dropout_p, std::optional<Tensor> seed) {
  FfnArgs args = normed_args(x, w1, b1, w2, norm_weight, norm_bias, norm, eps, activation, dropout_p, seed);
  const Gradients g = backward(args, grad_out, x, w1, b1, w2);
  return {g.x, g.w1, g.b1, g.w2, g.b2, g.norm};
}

}  // namespace ctr
