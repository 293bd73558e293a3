// Registration of the native CPU kernels as torch.ops.ctr.*; schemas are defined in ctr_kernels/library.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "simd_level.h"

using torch::stable::Tensor;

namespace ctr {
Tensor dropout_mask(int64_t rows, int64_t width, int64_t threshold, Tensor seed);
}  // namespace ctr

STABLE_TORCH_LIBRARY_IMPL(ctr, CompositeExplicitAutograd, m) {
  m.impl("select_simd", TORCH_BOX(&ctr::select_simd));
}

STABLE_TORCH_LIBRARY_IMPL(ctr, CPU, m) { m.impl("dropout_mask", TORCH_BOX(&ctr::dropout_mask)); }
