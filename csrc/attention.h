// ctr::field_attention_packed as a part of other operators; see attention.cpp.
#pragma once
#include "tensor_args.h"

namespace ctr {

Tensor field_attention_packed(Tensor qkv, int64_t num_heads, double scale, double dropout_p,
                              std::optional<Tensor> seed);
Tensor field_attention_packed_backward(Tensor grad_out, Tensor qkv, int64_t num_heads, double scale, double dropout_p,
                                       std::optional<Tensor> seed);

}  // namespace ctr
