// ctr::attention_block and its backward on CPUs: the attention half of a transformer layer, norm and residual included.
#include <tuple>

#include "attention.h"
#include "linear.h"

namespace ctr {
namespace {

// Without a gamma there is no norm.
NormArgs optional_norm(const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta, double eps,
                       int64_t width) {
  if (!gamma.has_value() || !beta.has_value()) return {nullptr, nullptr, 0.0f};
  return norm_args(*gamma, *beta, eps, width);
}

Tensor tokens_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "x and its gradients must be [B, F, D] and contiguous");
  Tensor same = x;
  return torch::stable::view(same, {x.size(0) * x.size(1), x.size(2)});
}

Tensor fields_of(Tensor tokens, const Tensor& like) {
  return torch::stable::view(tokens, {like.size(0), like.size(1), tokens.size(1)});
}

}  // namespace

// x + out(attention(qkv(LN(x)))) for x [B, F, D], and what its backward keeps: qkv [B, F, 3 D], attended [B, F, D].
std::tuple<Tensor, Tensor, Tensor> attention_block(Tensor x, std::optional<Tensor> gamma, std::optional<Tensor> beta,
                                                   double eps, Tensor w_qkv, Tensor b_qkv, Tensor w_out, Tensor b_out,
                                                   int64_t num_heads, double scale, double dropout_p,
                                                   std::optional<Tensor> seed) {
  const Tensor tokens = tokens_of(x);
  const Tensor qkv = fields_of(linear(tokens, optional_norm(gamma, beta, eps, x.size(2)), w_qkv, b_qkv, nullptr), x);
  const Tensor attended = field_attention_packed(qkv, num_heads, scale, dropout_p, seed);
  const Tensor y = linear(tokens_of(attended), {nullptr, nullptr, 0.0f}, w_out, b_out, &tokens);
  return {fields_of(y, x), qkv, attended};
}

// Gradients of x, gamma, beta (zero without a norm), w_qkv, b_qkv, w_out, b_out.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_block_backward(
    Tensor grad_out, Tensor x, Tensor qkv, Tensor attended, std::optional<Tensor> gamma, std::optional<Tensor> beta,
    double eps, Tensor w_qkv, Tensor w_out, int64_t num_heads, double scale, double dropout_p,
    std::optional<Tensor> seed) {
  const NormArgs none{nullptr, nullptr, 0.0f};
  const Tensor grad_tokens = tokens_of(grad_out);
  LinearGradientTensors out = linear_backward(grad_tokens, tokens_of(attended), none, w_out, nullptr);
  const Tensor grad_qkv = field_attention_packed_backward(fields_of(out.x, x), qkv, num_heads, scale, dropout_p, seed);
  out.x = Tensor();  // its memory is free for what follows
  const LinearGradientTensors in = linear_backward(tokens_of(grad_qkv), tokens_of(x),
                                                   optional_norm(gamma, beta, eps, x.size(2)), w_qkv, &grad_tokens);
  return {fields_of(in.x, x), in.gamma, in.beta, in.weight, in.bias, out.weight, out.bias};
}

}  // namespace ctr
