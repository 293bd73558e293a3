// Definition of torch.ops.ctr.* and registration of the CPU kernels; the schemas are in ctr_kernels/operators.inc.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <string>
#include <tuple>

#include "outputs.h"
#include "simd_level.h"

using torch::stable::Tensor;

namespace ctr {
Tensor dropout_mask(int64_t rows, int64_t width, int64_t threshold, Tensor seed);
Tensor field_attention(Tensor q, Tensor k, Tensor v, int64_t num_heads, double scale, double dropout_p,
                       std::optional<Tensor> seed);
std::tuple<Tensor, Tensor, Tensor> field_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                            int64_t num_heads, double scale, double dropout_p,
                                                            std::optional<Tensor> seed);
Tensor field_attention_packed(Tensor qkv, int64_t num_heads, double scale, double dropout_p,
                              std::optional<Tensor> seed);
Tensor field_attention_packed_backward(Tensor grad_out, Tensor qkv, int64_t num_heads, double scale,
                                       double dropout_p, std::optional<Tensor> seed);
std::tuple<Tensor, Tensor> ffn(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2,
                               std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, int64_t norm,
                               double eps, int64_t activation, double dropout_p, std::optional<Tensor> seed);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_backward(
    Tensor grad_out, Tensor x, std::optional<Tensor> z, Tensor w1, Tensor b1, Tensor w2,
    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, int64_t norm, double eps, int64_t activation,
    double dropout_p, std::optional<Tensor> seed);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_block(
    Tensor x, Tensor w_qkv, Tensor b_qkv, Tensor w_out, Tensor b_out, std::optional<Tensor> norm_weight,
    std::optional<Tensor> norm_bias, int64_t norm, double eps, int64_t num_heads, int64_t queries, double scale,
    double dropout_p, std::optional<Tensor> seed);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_block_backward(
    Tensor grad_out, Tensor x, Tensor qkv, Tensor q, Tensor heads, Tensor z, Tensor w_qkv, Tensor w_out,
    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, int64_t norm, double eps, int64_t num_heads,
    int64_t queries, double scale, double dropout_p, std::optional<Tensor> seed);
Tensor low_rank_cross(Tensor x0, Tensor x, Tensor u, Tensor v, Tensor bias);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_cross_backward(Tensor grad_out, Tensor x0, Tensor x,
                                                                           Tensor u, Tensor v, Tensor bias);
void use_huge_pages(Tensor table);
int64_t first_bad_id(Tensor ids, int64_t num_rows);
Tensor embedding_lookup(Tensor weight, Tensor ids, bool widen);
void sparse_update(Tensor weight, std::optional<Tensor> first, std::optional<Tensor> second, std::optional<Tensor> last,
                   Tensor ids, Tensor rows, std::optional<Tensor> sorted_ids, std::optional<Tensor> order, int64_t rule,
                   double lr, std::optional<Tensor> lr_on_device, double weight_decay, double eps, double beta1,
                   double beta2, std::optional<Tensor> step, std::optional<Tensor> seed);
bool parse_criteo(Tensor text, bool labelled, int64_t hash_bins, Tensor log1p, Tensor label, Tensor dense,
                  Tensor dense_missing, Tensor sparse, Tensor values, Tensor sparse_missing);
}  // namespace ctr

namespace {

constexpr char kSchemas[] =
#include "../ctr_kernels/operators.inc"
    ;

}  // namespace

STABLE_TORCH_LIBRARY(ctr, m) {
  std::istringstream lines(kSchemas);
  for (std::string line; std::getline(lines, line);)
    if (!line.empty() && line[0] != '#') m.def(line.c_str());
}

STABLE_TORCH_LIBRARY_IMPL(ctr, CompositeExplicitAutograd, m) {
  m.impl("select_simd", TORCH_BOX(&ctr::select_simd));
  m.impl("keep_outputs", TORCH_BOX(&ctr::keep_outputs));
  m.impl("empty_output_cache", TORCH_BOX(&ctr::empty_output_cache));
  m.impl("output_cache_stats", TORCH_BOX(&ctr::output_cache_stats));
}

STABLE_TORCH_LIBRARY_IMPL(ctr, CPU, m) {
  m.impl("dropout_mask", TORCH_BOX(&ctr::dropout_mask));
  m.impl("field_attention", TORCH_BOX(&ctr::field_attention));
  m.impl("field_attention_backward", TORCH_BOX(&ctr::field_attention_backward));
  m.impl("field_attention_packed", TORCH_BOX(&ctr::field_attention_packed));
  m.impl("field_attention_packed_backward", TORCH_BOX(&ctr::field_attention_packed_backward));
  m.impl("ffn", TORCH_BOX(&ctr::ffn));
  m.impl("ffn_backward", TORCH_BOX(&ctr::ffn_backward));
  m.impl("attention_block", TORCH_BOX(&ctr::attention_block));
  m.impl("attention_block_backward", TORCH_BOX(&ctr::attention_block_backward));
  m.impl("low_rank_cross", TORCH_BOX(&ctr::low_rank_cross));
  m.impl("low_rank_cross_backward", TORCH_BOX(&ctr::low_rank_cross_backward));
  m.impl("use_huge_pages", TORCH_BOX(&ctr::use_huge_pages));
  m.impl("first_bad_id", TORCH_BOX(&ctr::first_bad_id));
  m.impl("embedding_lookup", TORCH_BOX(&ctr::embedding_lookup));
  m.impl("sparse_update", TORCH_BOX(&ctr::sparse_update));
  m.impl("parse_criteo", TORCH_BOX(&ctr::parse_criteo));
}
