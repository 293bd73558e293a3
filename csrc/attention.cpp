// ctr::field_attention and its backward on CPUs: checks, outputs, and the samples shared among threads.
#include <tuple>
#include <vector>

#include "attention.h"

namespace ctr {
namespace {

Strided strided(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1)}; }

// Everything but the outputs, checked.
AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v, int64_t num_heads, double scale,
                             double dropout_p, const std::optional<Tensor>& seed) {
  AttentionArgs args{};
  args.type = type_of(q, "q");
  STD_TORCH_CHECK(q.dim() == 3, "q has ", q.dim(), " dimensions; [B, F, D] is needed");
  const int64_t batch = q.size(0), fields = q.size(1), dim = q.size(2);
  check_shape(k, {batch, fields, dim}, "k");
  check_shape(v, {batch, fields, dim}, "v");
  for (const Tensor* t : {&q, &k, &v}) {
    check_type(*t, q.scalar_type(), "q, k or v");
    STD_TORCH_CHECK(t->stride(2) == 1 || t->numel() == 0, "the last dimension of q, k and v must be contiguous");
  }
  STD_TORCH_CHECK(fields >= 1 && fields <= 64, "F=", fields, " fields; 1 to 64 are supported");
  STD_TORCH_CHECK(num_heads >= 1 && dim % num_heads == 0, "D=", dim, " is not divisible into num_heads=", num_heads);
  const int64_t width = dim / num_heads;
  STD_TORCH_CHECK(width == 8 || width == 16 || width == 32 || width == 64, "D / num_heads = ", width,
                  "; supported are 8, 16, 32, 64");
  args.samples = batch;
  args.fields = fields;
  args.heads = num_heads;
  args.head_dim = width;
  args.scale = static_cast<float>(scale);
  args.dropout = dropout_args(dropout_p, seed);
  args.q = strided(q);
  args.k = strided(k);
  args.v = strided(v);
  return args;
}

int64_t packed_dim(const Tensor& qkv) {
  STD_TORCH_CHECK(qkv.dim() == 3 && qkv.size(2) % 3 == 0, "qkv must be [B, F, 3 D]");
  return qkv.size(2) / 3;
}

}  // namespace

AttentionArgs packed_attention(const Tensor& qkv, int64_t num_heads, double scale, double dropout_p,
                               const std::optional<Tensor>& seed) {
  const int64_t dim = packed_dim(qkv);
  return attention_args(torch::stable::narrow(const_cast<Tensor&>(qkv), 2, 0, dim),
                        torch::stable::narrow(const_cast<Tensor&>(qkv), 2, dim, dim),
                        torch::stable::narrow(const_cast<Tensor&>(qkv), 2, 2 * dim, dim), num_heads, scale, dropout_p,
                        seed);
}

Tensor field_attention(Tensor q, Tensor k, Tensor v, int64_t num_heads, double scale, double dropout_p,
                       std::optional<Tensor> seed) {
  AttentionArgs args = attention_args(q, k, v, num_heads, scale, dropout_p, seed);
  Tensor out = new_output({q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  args.out = strided(out);
  args.around = args.head_dim % 16 == 0 && streams(out);
  const KernelTable& kernels = kernels_for(args.head_dim);
  torch::stable::parallel_for(0, q.size(0), 16, [&](int64_t first, int64_t last) {
    kernels.attention_forward(args, first, last);
  });
  return out;
}

namespace {

// Gradients of q, k and v into args.dq, dk and dv, lines of which may be written around the caches if `around`.
void differentiate(AttentionArgs& args, const Tensor& grad_out, const Tensor& q, bool around) {
  check_shape(grad_out, {q.size(0), q.size(1), q.size(2)}, "grad_out");
  check_type(grad_out, q.scalar_type(), "grad_out");
  STD_TORCH_CHECK(grad_out.stride(2) == 1 || grad_out.numel() == 0,
                  "the last dimension of grad_out must be contiguous");
  args.grad_out = strided(grad_out);
  args.around = args.head_dim % 16 == 0 && around;
  const KernelTable& kernels = kernels_for(args.head_dim);
  torch::stable::parallel_for(0, q.size(0), 16, [&](int64_t first, int64_t last) {
    kernels.attention_backward(args, first, last);
  });
}

Tensor third(const Tensor& qkv, int64_t which) {
  const int64_t dim = packed_dim(qkv);
  return torch::stable::narrow(const_cast<Tensor&>(qkv), 2, which * dim, dim);
}

}  // namespace

// The gradients of q, k and v.
std::tuple<Tensor, Tensor, Tensor> field_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                            int64_t num_heads, double scale, double dropout_p,
                                                            std::optional<Tensor> seed) {
  AttentionArgs args = attention_args(q, k, v, num_heads, scale, dropout_p, seed);
  const std::vector<int64_t> queries{q.size(0), q.size(1), q.size(2)}, keys{k.size(0), k.size(1), k.size(2)};
  Tensor dq = new_output(queries, q.scalar_type());
  Tensor dk = new_output(keys, q.scalar_type()), dv = new_output(keys, q.scalar_type());
  args.dq = strided(dq);
  args.dk = strided(dk);
  args.dv = strided(dv);
  differentiate(args, grad_out, q, streams(dq) && streams(dk) && streams(dv));
  return {dq, dk, dv};
}

// The same on one projection [B, F, 3 D] that holds q | k | v; its gradient comes out in one piece.
Tensor field_attention_packed(Tensor qkv, int64_t num_heads, double scale, double dropout_p,
                              std::optional<Tensor> seed) {
  return field_attention(third(qkv, 0), third(qkv, 1), third(qkv, 2), num_heads, scale, dropout_p, seed);
}

Tensor field_attention_packed_backward(Tensor grad_out, Tensor qkv, int64_t num_heads, double scale,
                                       double dropout_p, std::optional<Tensor> seed) {
  AttentionArgs args = packed_attention(qkv, num_heads, scale, dropout_p, seed);
  const int64_t batch = qkv.size(0), fields = qkv.size(1), dim = packed_dim(qkv);
  Tensor grads = new_output({batch, fields, 3 * dim}, qkv.scalar_type());
  const int64_t bytes = static_cast<int64_t>(grads.element_size()) * dim;
  char* data = static_cast<char*>(grads.mutable_data_ptr());
  args.dq = {data, fields * 3 * dim, 3 * dim};
  args.dk = {data + bytes, fields * 3 * dim, 3 * dim};
  args.dv = {data + 2 * bytes, fields * 3 * dim, 3 * dim};
  differentiate(args, grad_out, third(qkv, 0), streams(grads));
  return grads;
}

}  // namespace ctr
