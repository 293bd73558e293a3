// ctr::field_attention_packed as a part of other operators; see attention.cpp.
#pragma once
#include "tensor_args.h"

namespace ctr {

inline Strided strided(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1)}; }

// The inputs of attention, q [B, Q, E], k and v [B, F, E], checked; the outputs are missing.
AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v, int64_t num_heads, double scale,
                             double dropout_p, const std::optional<Tensor>& seed);

// Columns [which * width, (which + 1) * width) of a projection [B, F, n * width].
Tensor columns_of(const Tensor& projection, int64_t which, int64_t width);

}  // namespace ctr
