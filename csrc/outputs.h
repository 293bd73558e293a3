// Memory of the operators' outputs.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace ctr {

// Asks for huge pages for memory that has not been touched yet, where the system offers them.
void prefer_huge_pages(const torch::stable::Tensor& fresh);

// An uninitialised CPU tensor. A large one begins at a huge page, and its memory is kept when the tensor is freed, for
// the next ones. Where torch fills what it allocates (torch.utils.deterministic.fill_uninitialized_memory), it is filled
// in the same way.
torch::stable::Tensor new_output(std::vector<int64_t> shape, torch::headeronly::ScalarType type);

// Whether an fp32 output is so large that a kernel that fills whole lines of it should write around the caches: what is
// read is not pushed out, and no line is fetched before it is overwritten.
bool streams(const torch::stable::Tensor& out);

// Sets how many bytes of freed outputs are kept, and frees what is beyond; negative: changes nothing. Returns what was
// set before: CTR_KERNELS_CACHE_MB megabytes at first, or 1024 where that is not set.
int64_t keep_outputs(int64_t bytes);

// Gives back what is kept, and forgets how much was in use before.
void empty_output_cache();

// Bytes of outputs that are kept, that are in use, and that were in use at most at once.
std::tuple<int64_t, int64_t, int64_t> output_cache_stats();

}  // namespace ctr
