// ctr::field_attention and its backward on CPUs: checks, outputs, and the samples shared among threads.
#include <tuple>

#include "attention.h"

namespace ctr {

AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v, int64_t num_heads, double scale,
                             double dropout_p, const std::optional<Tensor>& seed) {
  AttentionArgs args{};
  args.type = type_of(q, "q");
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3, "q is [B, Q, E] and k [B, F, E]");
  const int64_t batch = q.size(0), queries = q.size(1), width = q.size(2), keys = k.size(1);
  check_shape(k, {batch, keys, width}, "k");
  check_shape(v, {batch, keys, width}, "v");
  for (const Tensor* t : {&q, &k, &v}) {
    check_type(*t, q.scalar_type(), "q, k or v");
    STD_TORCH_CHECK(t->stride(2) == 1 || t->numel() == 0 || width == 1,
                    "the last dimension of q, k and v must be contiguous");
  }
  STD_TORCH_CHECK(queries >= 1, "Q=", queries, " queries; at least 1 is needed");
  STD_TORCH_CHECK(keys >= 1 && keys <= kMaxKeys, "F=", keys, " fields; 1 to ", kMaxKeys, " are supported");
  STD_TORCH_CHECK(num_heads >= 1 && width % num_heads == 0, "E=", width, " is not divisible into num_heads=", num_heads);
  const int64_t head_dim = width / num_heads;
  STD_TORCH_CHECK(head_dim >= 1 && head_dim <= kMaxHead, "E / num_heads = ", head_dim, "; 1 to ", kMaxHead,
                  " are supported");
  args.samples = batch;
  args.queries = queries;
  args.keys = keys;
  args.heads = num_heads;
  args.head_dim = head_dim;
  args.scale = static_cast<float>(scale);
  args.dropout = dropout_args(dropout_p, seed);
  args.q = strided(q);
  args.k = strided(k);
  args.v = strided(v);
  return args;
}

Tensor columns_of(const Tensor& projection, int64_t which, int64_t width) {
  return torch::stable::narrow(const_cast<Tensor&>(projection), 2, which * width, width);
}

Tensor field_attention(Tensor q, Tensor k, Tensor v, int64_t num_heads, double scale, double dropout_p,
                       std::optional<Tensor> seed) {
  AttentionArgs args = attention_args(q, k, v, num_heads, scale, dropout_p, seed);
  Tensor out = new_output({q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  args.out = strided(out);
  args.around = streams(out);
  const KernelTable& kernels = kernels_for(16);
  torch::stable::parallel_for(0, q.size(0), 16, [&](int64_t first, int64_t last) {
    kernels.attention_forward(args, first, last);
  });
  return out;
}

namespace {

int64_t packed_width(const Tensor& qkv) {
  STD_TORCH_CHECK(qkv.dim() == 3 && qkv.size(2) % 3 == 0, "qkv must be [B, F, 3 E]");
  return qkv.size(2) / 3;
}

// Gradients into tensors of q's, k's and v's shapes.
void backward_into(AttentionArgs& args, const Tensor& grad_out, const Tensor& q, const Tensor& dq, const Tensor& dk,
                   const Tensor& dv, bool around) {
  check_shape(grad_out, {q.size(0), q.size(1), q.size(2)}, "grad_out");
  check_type(grad_out, q.scalar_type(), "grad_out");
  STD_TORCH_CHECK(grad_out.stride(2) == 1 || grad_out.numel() == 0 || q.size(2) == 1,
                  "the last dimension of grad_out must be contiguous");
  args.grad_out = strided(grad_out);
  args.dq = strided(dq);
  args.dk = strided(dk);
  args.dv = strided(dv);
  args.around = around;
  const KernelTable& kernels = kernels_for(16);
  torch::stable::parallel_for(0, args.samples, 16, [&](int64_t first, int64_t last) {
    kernels.attention_backward(args, first, last);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> field_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                            int64_t num_heads, double scale, double dropout_p,
                                                            std::optional<Tensor> seed) {
  AttentionArgs args = attention_args(q, k, v, num_heads, scale, dropout_p, seed);
  Tensor dq = new_output({args.samples, args.queries, q.size(2)}, q.scalar_type());
  Tensor dk = new_output({args.samples, args.keys, q.size(2)}, q.scalar_type());
  Tensor dv = new_output({args.samples, args.keys, q.size(2)}, q.scalar_type());
  backward_into(args, grad_out, q, dq, dk, dv, streams(dq) && streams(dk) && streams(dv));
  return {dq, dk, dv};
}

// The same on one projection [B, F, 3 E] that holds q | k | v; its gradient comes out in one piece.
Tensor field_attention_packed(Tensor qkv, int64_t num_heads, double scale, double dropout_p,
                              std::optional<Tensor> seed) {
  const int64_t width = packed_width(qkv);
  return field_attention(columns_of(qkv, 0, width), columns_of(qkv, 1, width), columns_of(qkv, 2, width), num_heads,
                         scale, dropout_p, seed);
}

Tensor field_attention_packed_backward(Tensor grad_out, Tensor qkv, int64_t num_heads, double scale,
                                       double dropout_p, std::optional<Tensor> seed) {
  const int64_t width = packed_width(qkv);
  const Tensor q = columns_of(qkv, 0, width), k = columns_of(qkv, 1, width), v = columns_of(qkv, 2, width);
  AttentionArgs args = attention_args(q, k, v, num_heads, scale, dropout_p, seed);
  Tensor grads = new_output({args.samples, args.keys, 3 * width}, qkv.scalar_type());
  backward_into(args, grad_out, q, columns_of(grads, 0, width), columns_of(grads, 1, width),
                columns_of(grads, 2, width), streams(grads));
  return grads;
}

}  // namespace ctr
