// Checks and views of tensor arguments that the CPU operators share.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "kernels.h"
#include "outputs.h"

namespace ctr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name,
                  ": the native kernels take float32 or bfloat16; kernels='eager' takes any floating dtype");
  return type == ScalarType::Float ? Type::f32 : Type::bf16;
}

inline void check_type(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has another dtype than the first tensor");
}

inline void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), name, " has ", t.dim(), " dimensions, not ",
                  shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(t.size(d) == size, name, " has size ", t.size(d), " in dimension ", d, ", not ", size);
    ++d;
  }
}

inline DropoutArgs dropout_args(double p, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout_p=", p, " is outside [0, 1)");
  if (p == 0.0) return {0, 0, 1.0f};
  STD_TORCH_CHECK(seed.has_value() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                  "dropout needs a seed: one int64 element");
  const auto key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  return {key, static_cast<uint32_t>(std::nearbyint(p * 2147483648.0)), static_cast<float>(1.0 / (1.0 - p))};
}

inline NormArgs norm_args(const Tensor& gamma, const Tensor& beta, double eps, int64_t width) {
  for (const Tensor* t : {&gamma, &beta}) {
    check_type(*t, ScalarType::Float, "a weight of the norm");
    check_shape(*t, {width}, "a weight of the norm");
    STD_TORCH_CHECK(t->is_contiguous(), "the weights of the norm must be contiguous");
  }
  return {static_cast<const float*>(gamma.const_data_ptr()), static_cast<const float*>(beta.const_data_ptr()),
          static_cast<float>(eps)};
}

}  // namespace ctr
