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

// The elements of a contiguous float32 tensor of that shape.
inline const float* floats(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
  check_shape(t, shape, name);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  return static_cast<const float*>(t.const_data_ptr());
}

// to[c * pitch + r] = from[r * from_pitch + c] for r < rows, c < columns, in blocks that stay in the cache.
inline void transpose_into(const float* from, int64_t rows, int64_t columns, int64_t from_pitch, float* to, int64_t pitch) {
  constexpr int64_t kBlock = 32;
  for (int64_t c0 = 0; c0 < columns; c0 += kBlock)
    for (int64_t r0 = 0; r0 < rows; r0 += kBlock)
      for (int64_t c = c0; c < columns && c < c0 + kBlock; ++c)
        for (int64_t r = r0; r < rows && r < r0 + kBlock; ++r) to[c * pitch + r] = from[r * from_pitch + c];
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
  return {floats(gamma, {width}, "the norm's weight"), floats(beta, {width}, "the norm's bias"),
          static_cast<float>(eps)};
}

}  // namespace ctr
