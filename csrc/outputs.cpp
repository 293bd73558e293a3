// The cache of large outputs; see outputs.h.
#include "outputs.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <sys/mman.h>

#include <cerrno>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <string>

namespace ctr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kHugePage = int64_t{2} << 20;  // bytes

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
#endif
}

struct Block {
  void* data;
  int64_t bytes;  // whole huge pages
};

// Whole huge pages of the system's own: the heap would keep what is freed in its middle. Null where there is no memory.
void* map(int64_t bytes) {
  void* const room = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return nullptr;
  const int64_t before = (kHugePage - reinterpret_cast<uintptr_t>(room) % kHugePage) % kHugePage;
  char* const begin = static_cast<char*>(room) + before;
  if (before > 0) munmap(room, before);
  if (before < kHugePage) munmap(begin + bytes, kHugePage - before);
  advise_huge_pages(begin, bytes);
  return begin;
}

class Cache {
 public:
  Block take(int64_t bytes) {
    const int64_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block)
      if (block->bytes >= whole && block->bytes <= whole + whole / 4 &&
          (best == free_.end() || block->bytes < best->bytes))
        best = block;
    if (best != free_.end()) {
      const Block found = *best;
      free_.erase(best);
      kept_ -= found.bytes;
      return found;
    }
    Block fresh{map(whole), whole};
    if (fresh.data == nullptr) {
      release(0);
      fresh.data = map(whole);
      STD_TORCH_CHECK(fresh.data != nullptr, "no memory for an output of ", bytes, " bytes");
    }
    return fresh;
  }

  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(block);
    kept_ += block.bytes;
    release(limit_);
  }

  int64_t limit(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t before = limit_;
    if (bytes >= 0) release(limit_ = bytes);
    return before;
  }

 private:
  static int64_t initial_limit() {
    const char* text = std::getenv("CTR_KERNELS_CACHE_MB");
    if (text == nullptr || *text == '\0') return int64_t{1} << 30;
    char* end = nullptr;
    errno = 0;
    const long long megabytes = std::strtoll(text, &end, 10);
    STD_TORCH_CHECK(errno == 0 && *end == '\0' && megabytes >= 0 && megabytes <= (int64_t{1} << 40),
                    "CTR_KERNELS_CACHE_MB=", std::string(text), ": a number of megabytes is needed, 0 or more");
    return megabytes << 20;
  }

  // Frees what was kept longest, down to `most` bytes.
  void release(int64_t most) {
    for (; kept_ > most; free_.pop_front()) {
      kept_ -= free_.front().bytes;
      munmap(free_.front().data, free_.front().bytes);
    }
  }

  std::mutex mutex_;
  std::deque<Block> free_;  // the longest kept first
  int64_t kept_ = 0, limit_ = initial_limit();
};

// Never destroyed: tensors may be freed after everything else.
Cache& cache() {
  static Cache* const only = new Cache;
  return *only;
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
  if (cache().limit(-1) == 0) {
    Tensor plain = torch::stable::empty(shape, type);
    prefer_huge_pages(plain);
    return plain;
  }
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d]) strides[d] = stride;
  const Block block = cache().take(bytes);
  return torch::stable::from_blob(block.data, shape, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
                                  [block](void*) { cache().give(block); });
}

bool streams(const Tensor& out) {
  constexpr int64_t kStreamed = int64_t{8} << 20;  // bytes
  return out.scalar_type() == ScalarType::Float && out.numel() * 4 >= kStreamed &&
         reinterpret_cast<uintptr_t>(out.data_ptr()) % 64 == 0;
}

int64_t keep_outputs(int64_t bytes) { return cache().limit(bytes); }

}  // namespace ctr
