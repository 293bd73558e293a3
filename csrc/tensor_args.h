// Checks and views of tensor arguments that the CPU operators share, and their outputs.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "kernels.h"

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

constexpr int64_t kHugePage = int64_t{2} << 20;  // bytes

// Asks for huge pages for memory that has not been touched yet, where the system offers them.
inline void prefer_huge_pages(const Tensor& fresh) {
#if defined(__linux__)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(fresh.numel()) * fresh.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
#endif
}

// An uninitialised CPU tensor in huge pages: a freshly mapped output is faulted in page by page, and with 4 KB pages
// that costs more than the kernels that fill it. A large one begins at a page inside of a storage that has room to
// whole pages at both ends, for its first and last part would come in hundreds of small pages otherwise.
inline Tensor new_output(std::vector<int64_t> shape, ScalarType type) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  const int64_t size = type == ScalarType::BFloat16 ? 2 : 4, bytes = count * size;
  if (bytes < 2 * kHugePage) return torch::stable::empty(shape, type);
  const int64_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  Tensor storage = torch::stable::empty({(whole + kHugePage) / size}, type);
  prefer_huge_pages(storage);
  const int64_t begin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(storage.mutable_data_ptr()));
  const int64_t offset = (kHugePage - begin % kHugePage) % kHugePage;
  Tensor flat = torch::stable::narrow(storage, 0, offset / size, count);
  return torch::stable::view(flat, shape);
}

}  // namespace ctr
