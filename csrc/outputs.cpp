// Where the memory of outputs comes from; see outputs.h.
#include "outputs.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "output_cache.h"

namespace ctr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether torch fills what it allocates. The stable ABI does not tell, so torch is asked for a few integers: filled, they
// are the largest there are. They are zeroed after, and asked for twice, since memory that was filled once may come back.
bool torch_fills() {
  constexpr int64_t kCount = 8;
  for (int time = 0; time < 2; ++time) {
    const Tensor probe = torch::stable::empty({kCount}, ScalarType::Long);
    int64_t* const values = static_cast<int64_t*>(probe.mutable_data_ptr());
    const auto filled = [](int64_t value) { return value == std::numeric_limits<int64_t>::max(); };
    if (!std::all_of(values, values + kCount, filled)) return false;
    std::fill_n(values, kCount, 0);
  }
  return true;
}

}  // namespace

void prefer_huge_pages(const Tensor& fresh) {
  advise_huge_pages(fresh.mutable_data_ptr(), fresh.numel() * static_cast<int64_t>(fresh.element_size()));
}

Tensor new_output(std::vector<int64_t> shape, ScalarType type) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  const int64_t bytes = count * (type == ScalarType::Float ? 4 : 2);
  const bool known = type == ScalarType::Float || type == ScalarType::BFloat16;
  if (!known || bytes < kHugePage / 2) return torch::stable::empty(shape, type);
  if (output_cache().limit(-1) == 0) {
    Tensor plain = torch::stable::empty(shape, type);
    prefer_huge_pages(plain);
    return plain;
  }
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d]) strides[d] = stride;
  const Block block = output_cache().take(bytes);
  Tensor out = torch::stable::from_blob(block.data, shape, strides,
                                        torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
                                        [block](void*) { output_cache().give(block); });
  if (torch_fills()) torch::stable::fill_(out, std::numeric_limits<double>::quiet_NaN());
  return out;
}

bool streams(const Tensor& out) {
  constexpr int64_t kStreamed = int64_t{8} << 20;  // bytes
  return out.scalar_type() == ScalarType::Float && out.numel() * 4 >= kStreamed &&
         reinterpret_cast<uintptr_t>(out.data_ptr()) % 64 == 0;
}

int64_t keep_outputs(int64_t bytes) { return output_cache().limit(bytes); }

void empty_output_cache() { output_cache().empty(); }

std::tuple<int64_t, int64_t, int64_t> output_cache_stats() {
  const OutputCacheStats stats = output_cache().stats();
  return {stats.kept, stats.in_use, stats.most_in_use};
}

}  // namespace ctr
