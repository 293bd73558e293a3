// ctr::attention_block and its backward on CPUs: the attention half of a transformer layer, norm and residual included.
//
// A few samples at a time go through norm, projection, attention, projection, residual: what one step writes the next
// one reads from the cache. Backward the gradients of q | k | v and of the attended values are in memory for those
// samples only.
#include <algorithm>
#include <tuple>

#include "aligned.h"
#include "attention.h"

namespace ctr {
namespace {

constexpr int64_t kTokensAtOnce = 3 * kLinearTile;

Strided strided(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1)}; }

NormArgs optional_norm(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t norm, double eps,
                       int64_t width) {
  if (norm == 0) return {nullptr, nullptr, 0.0f};
  STD_TORCH_CHECK(weight.has_value() && bias.has_value(), "norm=", norm, " needs a weight and a bias");
  return norm_args(*weight, *bias, eps, width);
}

// A projection from width `in` to `out` of x [B, F, in].
LinearArgs linear_args(const float* x, int64_t tokens, int64_t in, int64_t out, const NormArgs& norm) {
  STD_TORCH_CHECK(in > 0 && in % 16 == 0 && out > 0 && out % 16 == 0, "widths ", in, " and ", out,
                  " must be multiples of 16");
  LinearArgs args{};
  args.tokens = tokens;
  args.in = in;
  args.out = out;
  args.x = x;
  args.norm = norm;
  return args;
}

int64_t tiles_of(const LinearArgs& args) { return (args.tokens + kLinearTile - 1) / kLinearTile; }

// Consecutive samples, and the same as tokens.
struct Part {
  int64_t first, count, token, tokens;
};

struct Parts {
  int64_t batch, fields, at_once, number;

  explicit Parts(const Tensor& x) : batch(x.size(0)), fields(x.size(1)) {
    at_once = std::max<int64_t>(1, kTokensAtOnce / std::max<int64_t>(1, fields));
    number = (batch + at_once - 1) / at_once;
  }
  Part operator[](int64_t i) const {
    const int64_t first = i * at_once, count = std::min(at_once, batch - first);
    return {first, count, first * fields, count * fields};
  }
};

// Without the samples before `sample`; q, k and v only.
AttentionArgs from_sample(const AttentionArgs& args, int64_t sample) {
  AttentionArgs rest = args;
  rest.first_sample += sample;
  rest.samples -= sample;
  for (Strided* t : {&rest.q, &rest.k, &rest.v}) t->data = static_cast<float*>(t->data) + sample * t->batch;
  return rest;
}

AlignedFloats transposed(const float* weight, int64_t out, int64_t in) {
  AlignedFloats to(in * out);
  transpose_into(weight, out, in, in, to.data(), out);
  return to;
}

}  // namespace

// x + out(attention(qkv(X))) for x [B, F, D], X = LN(x) or x (norm 1 and 0), and what its backward keeps: qkv [B, F, 3 D],
// the heads' output [B, F, D]. queries and norm 2 are not implemented: q and z are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_block(
    Tensor x, Tensor w_qkv, Tensor b_qkv, Tensor w_out, Tensor b_out, std::optional<Tensor> norm_weight,
    std::optional<Tensor> norm_bias, int64_t norm, double eps, int64_t num_heads, int64_t queries, double scale,
    double dropout_p, std::optional<Tensor> seed) {
  STD_TORCH_CHECK(queries == 0 && (norm == 0 || norm == 1), "queries=", queries, " and norm=", norm, " are unknown");
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, F, D]");
  const int64_t batch = x.size(0), fields = x.size(1), dim = x.size(2), tokens = batch * fields;
  const float* from = floats(x, {batch, fields, dim}, "x");
  Tensor qkv = new_output({batch, fields, 3 * dim}, ScalarType::Float);
  Tensor attended = new_output({batch, fields, dim}, ScalarType::Float);
  Tensor y = new_output({batch, fields, dim}, ScalarType::Float);

  LinearArgs in = linear_args(from, tokens, dim, 3 * dim, optional_norm(norm_weight, norm_bias, norm, eps, dim));
  const AlignedFloats in_weight = transposed(floats(w_qkv, {3 * dim, dim}, "w_qkv"), 3 * dim, dim);
  in.weight = in_weight.data();
  in.bias = floats(b_qkv, {3 * dim}, "b_qkv");
  in.y = static_cast<float*>(qkv.mutable_data_ptr());
  AttentionArgs attention = packed_attention(qkv, num_heads, scale, dropout_p, seed);
  attention.out = strided(attended);
  LinearArgs out = linear_args(static_cast<float*>(attended.mutable_data_ptr()), tokens, dim, dim, {});
  const AlignedFloats out_weight = transposed(floats(w_out, {dim, dim}, "w_out"), dim, dim);
  out.weight = out_weight.data();
  out.bias = floats(b_out, {dim}, "b_out");
  out.residual = from;
  out.y = static_cast<float*>(y.mutable_data_ptr());
  out.around = streams(y);

  const Parts parts(x);
  const KernelTable& kernels = kernels_for(16);
  torch::stable::parallel_for(0, parts.number, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Part part = parts[i];
      LinearArgs in_part = in, out_part = out;
      in_part.tokens = out_part.tokens = part.tokens;
      in_part.x += part.token * dim;
      in_part.y += part.token * 3 * dim;
      kernels.linear_forward(in_part, 0, tiles_of(in_part));
      kernels.attention_forward(attention, part.first, part.first + part.count);
      out_part.x += part.token * dim;
      out_part.residual += part.token * dim;
      out_part.y += part.token * dim;
      kernels.linear_forward(out_part, 0, tiles_of(out_part));
    }
  });
  return {y, qkv, torch::stable::empty({0}, ScalarType::Float), attended, torch::stable::empty({0}, ScalarType::Float)};
}

// Gradients of x, w_qkv, b_qkv, w_out, b_out and the norm [2, D]. Those of the weights are summed in tasks whose number
// does not depend on the threads.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_block_backward(
    Tensor grad_out, Tensor x, Tensor qkv, Tensor q, Tensor attended, Tensor z, Tensor w_qkv, Tensor w_out,
    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, int64_t norm, double eps, int64_t num_heads,
    int64_t queries, double scale, double dropout_p, std::optional<Tensor> seed) {
  STD_TORCH_CHECK(queries == 0 && (norm == 0 || norm == 1), "queries=", queries, " and norm=", norm, " are unknown");
  constexpr int64_t kTasks = 32;
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, F, D]");
  const int64_t batch = x.size(0), fields = x.size(1), dim = x.size(2), tokens = batch * fields;
  const float *from = floats(x, {batch, fields, dim}, "x"), *grad = floats(grad_out, {batch, fields, dim}, "grad_out");
  floats(qkv, {batch, fields, 3 * dim}, "qkv");
  Tensor grad_x = new_output({batch, fields, dim}, ScalarType::Float);

  LinearArgs out = linear_args(floats(attended, {batch, fields, dim}, "attended"), tokens, dim, dim, {});
  out.weight = floats(w_out, {dim, dim}, "w_out");
  out.y = const_cast<float*>(grad);
  AttentionArgs attention = packed_attention(qkv, num_heads, scale, dropout_p, seed);
  LinearArgs in = linear_args(from, tokens, dim, 3 * dim, optional_norm(norm_weight, norm_bias, norm, eps, dim));
  in.weight = floats(w_qkv, {3 * dim, dim}, "w_qkv");
  in.residual = grad;
  in.grad_x = static_cast<float*>(grad_x.mutable_data_ptr());
  in.around = streams(grad_x);

  // Of one task's sums: w_qkv, b_qkv, gamma, beta, w_out, b_out, each a multiple of 16 floats.
  const int64_t sizes[6] = {3 * dim * dim, 3 * dim, dim, dim, dim * dim, dim};
  int64_t offsets[7] = {};
  for (int i = 0; i < 6; ++i) offsets[i + 1] = offsets[i] + sizes[i];
  const int64_t size = offsets[6];
  const Parts parts(x);
  const int64_t tasks = std::min(parts.number, kTasks);
  Tensor sums = new_output({std::max<int64_t>(tasks, 1), size}, ScalarType::Float);
  float* data = static_cast<float*>(sums.mutable_data_ptr());
  if (tasks == 0) std::fill_n(data, size, 0.0f);
  const KernelTable& kernels = kernels_for(16);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first_task, int64_t last_task) {
    const int64_t most = parts.at_once * fields;  // tokens
    const AlignedFloats grad_attended(most * dim), grad_qkv(most * 3 * dim);
    for (int64_t task = first_task; task < last_task; ++task) {
      float* own = data + task * size;
      std::fill_n(own, size, 0.0f);
      const LinearGradients in_sums{own, own + offsets[1], own + offsets[2], own + offsets[3]};
      const LinearGradients out_sums{own + offsets[4], own + offsets[5], nullptr, nullptr};
      for (int64_t i = parts.number * task / tasks; i < parts.number * (task + 1) / tasks; ++i) {
        const Part part = parts[i];
        LinearArgs in_part = in, out_part = out;
        in_part.tokens = out_part.tokens = part.tokens;
        out_part.x += part.token * dim;
        out_part.y += part.token * dim;
        out_part.grad_x = grad_attended.data();
        kernels.linear_backward(out_part, out_sums, 0, tiles_of(out_part));
        AttentionArgs some = from_sample(attention, part.first);
        some.grad_out = {grad_attended.data(), fields * dim, dim};
        some.dq = {grad_qkv.data(), fields * 3 * dim, 3 * dim};
        some.dk = {grad_qkv.data() + dim, fields * 3 * dim, 3 * dim};
        some.dv = {grad_qkv.data() + 2 * dim, fields * 3 * dim, 3 * dim};
        kernels.attention_backward(some, 0, part.count);
        in_part.x += part.token * dim;
        in_part.y = grad_qkv.data();
        in_part.residual += part.token * dim;
        in_part.grad_x += part.token * dim;
        kernels.linear_backward(in_part, in_sums, 0, tiles_of(in_part));
      }
    }
  });
  torch::stable::parallel_for(0, size, 4096, [&](int64_t first, int64_t last) {
    for (int64_t task = 1; task < tasks; ++task)
      for (int64_t i = first; i < last; ++i) data[i] += data[task * size + i];
  });
  const auto taken = [&](std::vector<int64_t> shape, int which, int64_t count) {
    Tensor t = torch::stable::empty(shape, ScalarType::Float);
    std::copy_n(data + offsets[which], count, static_cast<float*>(t.mutable_data_ptr()));
    return t;
  };
  Tensor norms = norm == 0 ? torch::stable::empty({0}, ScalarType::Float) : taken({2, dim}, 2, 2 * dim);
  return {grad_x, taken({3 * dim, dim}, 0, sizes[0]), taken({3 * dim}, 1, sizes[1]), taken({dim, dim}, 4, sizes[4]),
          taken({dim}, 5, sizes[5]), norms};
}

}  // namespace ctr
