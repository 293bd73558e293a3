// ctr::ffn and its backward on CPUs: weights packed once a call, tiles shared among threads.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "aligned.h"
#include "tensor_args.h"

namespace ctr {
namespace {

enum Norm : int64_t { kNone, kPre, kPost, kNormed };  // of the operator's argument `norm`

// A bf16 or fp32 tensor as fp32, contiguous.
class Floats {
 public:
  explicit Floats(const Tensor& t)
      : tensor_(torch::stable::contiguous(torch::stable::to(t, ScalarType::Float))),
        data_(static_cast<const float*>(tensor_.const_data_ptr())) {}
  const float* data() const { return data_; }

 private:
  Tensor tensor_;
  const float* data_;
};

struct Weights {
  const Tensor &w1, &b1, &w2;
  const std::optional<Tensor>&gamma, &beta;  // of the norm, if there is one
};

struct Packed {
  AlignedFloats w1t, b1, w2t, w1, w2, gamma, beta;  // padded with zeros; see FfnArgs
};

AlignedFloats padded_vector(const Tensor& t, int64_t count) {
  const Floats from(t);
  AlignedFloats to = AlignedFloats::zeros(count);
  std::copy_n(from.data(), t.numel(), to.data());
  return to;
}

// Rows [rows, columns] with their pitches in floats.
void copy_rows(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to, int64_t to_pitch) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * to_pitch, from + r * from_pitch, columns * sizeof(float));
}

Packed pack(const FfnArgs& args, const Weights& weights, bool backward) {
  const int64_t dim = args.dim, dp = args.dp, hidden = args.hidden, halves = args.halves;
  const int64_t padded = args.slices * kFfnSlice;
  const Floats w1(weights.w1), b1(weights.b1), w2(weights.w2);
  Packed p;
  p.w1t = AlignedFloats::zeros(halves * padded * dim);
  p.b1 = AlignedFloats::zeros(halves * padded);
  if (weights.gamma.has_value()) {
    p.gamma = padded_vector(*weights.gamma, dp);
    p.beta = padded_vector(*weights.beta, dp);
  }
  if (backward) {
    p.w1 = AlignedFloats::zeros(halves * padded * dp);
    p.w2 = AlignedFloats::zeros(padded * dim);
  } else {
    p.w2t = AlignedFloats::zeros(padded * dp);
  }
  torch::stable::parallel_for(0, args.slices, 1, [&](int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; ++slice) {
      const int64_t unit = slice * kFfnSlice, units = std::min(kFfnSlice, hidden - unit);
      for (int64_t half = 0; half < halves; ++half) {
        const float* rows = w1.data() + (half * hidden + unit) * dim;
        const int64_t to = unit * halves + half * kFfnSlice;
        transpose_into(rows, units, dim, dim, p.w1t.data() + to * dim, kFfnSlice);
        std::copy_n(b1.data() + half * hidden + unit, units, p.b1.data() + to);
        if (backward) copy_rows(rows, dim, units, dim, p.w1.data() + to * dp, dp);
      }
      if (backward)
        copy_rows(w2.data() + unit, hidden, dim, units, p.w2.data() + unit * dim, kFfnSlice);
      else
        transpose_into(w2.data() + unit, dim, units, hidden, p.w2t.data() + unit * dp, dp);
    }
  });
  return p;
}

void use(FfnArgs& args, const Packed& p) {
  args.w1t = p.w1t.data();
  args.b1 = p.b1.data();
  args.w2t = p.w2t.data();
  args.w1 = p.w1.data();
  args.w2 = p.w2.data();
  args.norm.gamma = p.gamma.data();
  args.norm.beta = p.beta.data();
}

FfnArgs ffn_args(const Tensor& x, const Weights& weights, int64_t norm, double eps, int64_t activation,
                 double dropout_p, const std::optional<Tensor>& seed) {
  FfnArgs args{};
  args.type = type_of(x, "x");
  STD_TORCH_CHECK(x.dim() == 2 && weights.w2.dim() == 2, "x is [tokens, D] and w2 [D, hidden]");
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::swiglu), "activation=", activation,
                  "; 0 to 5 are known");
  args.activation = static_cast<Activation>(activation);
  args.halves = is_gated(args.activation) ? 2 : 1;
  args.tokens = x.size(0);
  args.dim = x.size(1);
  args.hidden = weights.w2.size(1);
  STD_TORCH_CHECK(args.dim >= 1 && args.hidden >= 1, "D=", args.dim, ", hidden=", args.hidden,
                  "; at least 1 is needed");
  check_shape(weights.w1, {args.halves * args.hidden, args.dim}, "w1");
  check_shape(weights.b1, {args.halves * args.hidden}, "b1");
  check_shape(weights.w2, {args.dim, args.hidden}, "w2");
  for (const Tensor* t : {&weights.w1, &weights.b1, &weights.w2}) check_type(*t, x.scalar_type(), "a weight");
  STD_TORCH_CHECK(norm == kNone || norm == kPre || norm == kNormed, "norm=", norm,
                  "; the native kernels know 0 (none), 1 (pre) and 3 (normed)");
  const bool given = weights.gamma.has_value() && weights.beta.has_value();
  STD_TORCH_CHECK(given == (norm != kNone), "norm_weight and norm_bias are needed with a norm, and without one not");
  if (given) {
    check_shape(*weights.gamma, {args.dim}, "norm_weight");
    check_shape(*weights.beta, {args.dim}, "norm_bias");
  }
  args.norm.eps = static_cast<float>(eps);
  args.normed_residual = norm == kNormed;
  args.dp = (args.dim + 15) / 16 * 16;
  args.slices = (args.hidden + kFfnSlice - 1) / kFfnSlice;
  args.dropout = dropout_args(dropout_p, seed);
  args.x = x.const_data_ptr();
  return args;
}

int64_t tiles_of(const FfnArgs& args) { return (args.tokens + kFfnTile - 1) / kFfnTile; }

// How many tasks sum the weights' gradients. It does not depend on the threads, so that the result does not either; a
// task has eight tiles where there are that many, else writing and adding its sums takes a tenth of its time.
int64_t tasks_of(int64_t tiles) {
  int64_t tasks = 32;
  while (tasks > 8 && tiles < 8 * tasks) tasks /= 2;
  return std::min(tasks, tiles);
}

// Of the weights, one of the tasks' sums after the other; the offsets of each in floats.
struct SumsLayout {
  int64_t w1, w2t, b1, b2, gamma, beta, size;

  explicit SumsLayout(const FfnArgs& args) {
    const int64_t padded = args.slices * kFfnSlice;
    w1 = 0;
    w2t = w1 + args.halves * padded * args.dp;
    b1 = w2t + padded * args.dp;
    b2 = b1 + args.halves * padded;
    gamma = b2 + args.dp;
    beta = gamma + args.dp;
    size = beta + args.dp;
  }
  FfnGradients at(float* sums) const { return {sums + w1, sums + w2t, sums + b1, sums + b2, sums + gamma, sums + beta}; }
};

Tensor as_type(const Tensor& t, ScalarType type) { return type == ScalarType::Float ? t : torch::stable::to(t, type); }

}  // namespace

// y = ffn(x), x + ffn(LN(x)) or n + ffn(n) with n = LN(x), for x [tokens, D]; nothing else is kept for backward.
std::tuple<Tensor, Tensor> ffn(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, std::optional<Tensor> norm_weight,
                               std::optional<Tensor> norm_bias, int64_t norm, double eps, int64_t activation,
                               double dropout_p, std::optional<Tensor> seed) {
  const Weights weights{w1, b1, w2, norm_weight, norm_bias};
  FfnArgs args = ffn_args(x, weights, norm, eps, activation, dropout_p, seed);
  check_shape(b2, {args.dim}, "b2");
  check_type(b2, x.scalar_type(), "b2");
  const Packed packed = pack(args, weights, false);
  const AlignedFloats bias = padded_vector(b2, args.dp);
  use(args, packed);
  args.b2 = bias.data();
  Tensor y = new_output({args.tokens, args.dim}, x.scalar_type());
  args.out = y.mutable_data_ptr();
  const KernelTable& kernels = kernels_for(args.dp);
  torch::stable::parallel_for(0, tiles_of(args), 1, [&](int64_t first, int64_t last) {
    kernels.ffn_forward(args, first, last);
  });
  return {y, torch::stable::empty({0}, x.scalar_type())};
}

// Gradients of x, w1, b1, w2, b2, and fp32 [2, D] of the norm's weight and bias.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_backward(
    Tensor grad_out, Tensor x, std::optional<Tensor> z, Tensor w1, Tensor b1, Tensor w2,
    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, int64_t norm, double eps, int64_t activation,
    double dropout_p, std::optional<Tensor> seed) {
  const Weights weights{w1, b1, w2, norm_weight, norm_bias};
  FfnArgs args = ffn_args(x, weights, norm, eps, activation, dropout_p, seed);
  check_shape(grad_out, {args.tokens, args.dim}, "grad_out");
  check_type(grad_out, x.scalar_type(), "grad_out");
  STD_TORCH_CHECK(grad_out.is_contiguous(), "grad_out must be contiguous");
  const Packed packed = pack(args, weights, true);
  use(args, packed);
  args.grad_out = grad_out.const_data_ptr();
  Tensor dx = new_output({args.tokens, args.dim}, x.scalar_type());
  args.out = dx.mutable_data_ptr();

  const SumsLayout layout(args);
  const int64_t tiles = tiles_of(args), tasks = tasks_of(tiles);
  Tensor sums = new_output({std::max<int64_t>(tasks, 1), layout.size}, ScalarType::Float);
  float* const data = static_cast<float*>(sums.mutable_data_ptr());
  if (tasks == 0) std::fill_n(data, layout.size, 0.0f);
  const KernelTable& kernels = kernels_for(args.dp);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      float* const own = data + task * layout.size;
      std::fill(own + layout.b1, own + layout.size, 0.0f);
      kernels.ffn_backward(args, layout.at(own), tiles * task / tasks, tiles * (task + 1) / tasks);
    }
  });
  torch::stable::parallel_for(0, layout.size, 4096, [&](int64_t first, int64_t last) {
    for (int64_t task = 1; task < tasks; ++task)
      for (int64_t i = first; i < last; ++i) data[i] += data[task * layout.size + i];
  });

  const int64_t dim = args.dim, dp = args.dp, hidden = args.hidden, halves = args.halves;
  const ScalarType f32 = ScalarType::Float, type = x.scalar_type();
  Tensor dw1 = torch::stable::empty({halves * hidden, dim}, f32), db1 = torch::stable::empty({halves * hidden}, f32);
  Tensor dw2 = torch::stable::empty({dim, hidden}, f32), db2 = torch::stable::empty({dim}, f32);
  Tensor dnorm = torch::stable::empty(norm == kNone ? std::vector<int64_t>{0} : std::vector<int64_t>{2, dim}, f32);
  const auto floats_of = [](Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  float *const to_w1 = floats_of(dw1), *const to_b1 = floats_of(db1), *const to_w2 = floats_of(dw2);
  torch::stable::parallel_for(0, args.slices, 1, [&](int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; ++slice) {
      const int64_t unit = slice * kFfnSlice, units = std::min(kFfnSlice, hidden - unit);
      for (int64_t half = 0; half < halves; ++half) {
        const int64_t from = unit * halves + half * kFfnSlice, to = half * hidden + unit;
        copy_rows(data + layout.w1 + from * dp, dp, units, dim, to_w1 + to * dim, dim);
        std::copy_n(data + layout.b1 + from, units, to_b1 + to);
      }
      transpose_into(data + layout.w2t + unit * dp, units, dim, dp, to_w2 + unit, hidden);
    }
  });
  std::copy_n(data + layout.b2, dim, floats_of(db2));
  if (norm != kNone) copy_rows(data + layout.gamma, dp, 2, dim, floats_of(dnorm), dim);
  return {dx, as_type(dw1, type), as_type(db1, type), as_type(dw2, type), as_type(db2, type), dnorm};
}

}  // namespace ctr
