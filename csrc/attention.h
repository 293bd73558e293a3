// ctr::field_attention_packed as a part of other operators; see attention.cpp.
#pragma once
#include "tensor_args.h"

namespace ctr {

// The inputs of attention on a projection [B, F, 3 E] that holds q | k | v, checked; the outputs are missing.
AttentionArgs packed_attention(const Tensor& qkv, int64_t num_heads, double scale, double dropout_p,
                               const std::optional<Tensor>& seed);

}  // namespace ctr
