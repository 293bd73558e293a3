// ctr::dropout_mask: the Philox keep-mask of a [rows, width] map, drawn as ctr_kernels/philox.py defines it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "philox.h"

using torch::stable::Tensor;

namespace ctr {

// seed: int64 [1]; threshold: round(p * 2^31). Returns bool [rows, width], true = keep.
Tensor dropout_mask(int64_t rows, int64_t width, int64_t threshold, Tensor seed) {
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  Tensor mask = torch::stable::empty({rows, width}, torch::headeronly::ScalarType::Bool);
  bool* out = static_cast<bool*>(mask.mutable_data_ptr());
  const int64_t groups = (width + 31) / 32;
  torch::stable::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t lane = 0; lane < 8; ++lane) {
          const Philox4 draw = philox4x32_10(key, static_cast<uint64_t>((row * groups + group) * 8 + lane));
          for (int64_t word = 0; word < 4; ++word) {
            const int64_t column = group * 32 + word * 8 + lane;
            if (column < width)
              out[row * width + column] = static_cast<int64_t>(draw.word[word] >> 1) >= threshold;
          }
        }
  });
  return mask;
}

}  // namespace ctr
