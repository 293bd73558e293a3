// The cache of large outputs; see output_cache.h.
#include "output_cache.h"

#include <torch/csrc/stable/library.h>

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <string>

namespace ctr {
namespace {

// Whole huge pages of the system's own: the heap would keep what is freed in its middle. Null where there is no memory.
char* map(int64_t bytes) {
  void* const room = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return nullptr;
  const int64_t before = (kHugePage - reinterpret_cast<uintptr_t>(room) % kHugePage) % kHugePage;
  char* const begin = static_cast<char*>(room) + before;
  if (before > 0) munmap(room, before);
  if (before < kHugePage) munmap(begin + bytes, kHugePage - before);
  advise_huge_pages(begin, bytes);
  return begin;
}

bool has_huge_pages() {
  std::string modes;
  std::getline(std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled"), modes);
  return !modes.empty() && modes.find("[never]") == std::string::npos;
}

// Lets the system take the pages of a kept block when it runs short of memory, for another process as well. A huge page
// is marked in a microsecond, next to the hundred that filling it takes, and faults only if it was taken; small ones
// would take a third of that time and be three times as slow to fill again, so that they are not marked.
void offer([[maybe_unused]] const Block& block) {
#if defined(MADV_FREE)
  static const bool cheap = has_huge_pages();
  if (cheap) madvise(block.data, block.bytes, MADV_FREE);  // a hint: may fail
#endif
}

}  // namespace

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
#endif
}

Block OutputCache::take(int64_t bytes) {
  const int64_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  const std::lock_guard<std::mutex> lock(mutex_);
  auto best = free_.end();
  for (auto block = free_.begin(); block != free_.end(); ++block)
    if (block->second.bytes >= whole && (best == free_.end() || block->second.bytes < best->second.bytes)) best = block;
  Block taken{nullptr, whole};
  if (best != free_.end()) {
    taken.data = best->first;
    const Kept rest{best->second.bytes - whole, best->second.since};
    free_.erase(best);
    if (rest.bytes > 0) free_.emplace(taken.data + whole, rest);
    kept_ -= whole;
  } else {
    release(std::max(most_in_use_, in_use_ + whole) - in_use_ - whole);
    taken.data = map(whole);
    if (taken.data == nullptr) {
      release(0);
      taken.data = map(whole);
      STD_TORCH_CHECK(taken.data != nullptr, "no memory for an output of ", bytes, " bytes");
    }
  }
  in_use_ += whole;
  most_in_use_ = std::max(most_in_use_, in_use_);
  return taken;
}

void OutputCache::give(Block block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  in_use_ -= block.bytes;
  kept_ += block.bytes;
  offer(block);
  auto next = free_.lower_bound(block.data);
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second.bytes == block.data) {
      block = {before->first, before->second.bytes + block.bytes};
      free_.erase(before);
    }
  }
  if (next != free_.end() && block.data + block.bytes == next->first) {
    block.bytes += next->second.bytes;
    free_.erase(next);
  }
  free_.emplace(block.data, Kept{block.bytes, ++given_});
  release(limit_);
}

int64_t OutputCache::limit(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t before = limit_;
  if (bytes >= 0) release(limit_ = bytes);
  return before;
}

void OutputCache::empty() {
  const std::lock_guard<std::mutex> lock(mutex_);
  release(0);
  most_in_use_ = in_use_;
}

OutputCacheStats OutputCache::stats() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {kept_, in_use_, most_in_use_};
}

// Frees what was kept longest, down to `most` bytes: of the last block the end that is too much.
void OutputCache::release(int64_t most) {
  while (kept_ > most) {
    const auto oldest = std::min_element(free_.begin(), free_.end(), [](const auto& a, const auto& b) {
      return a.second.since < b.second.since;
    });
    const int64_t excess = (kept_ - most + kHugePage - 1) / kHugePage * kHugePage;
    const int64_t bytes = std::min(excess, oldest->second.bytes);
    munmap(oldest->first + oldest->second.bytes - bytes, bytes);
    kept_ -= bytes;
    oldest->second.bytes -= bytes;
    if (oldest->second.bytes == 0) free_.erase(oldest);
  }
}

int64_t OutputCache::initial_limit() {
  const char* text = std::getenv("CTR_KERNELS_CACHE_MB");
  if (text == nullptr || *text == '\0') return int64_t{1} << 30;
  char* end = nullptr;
  errno = 0;
  const long long megabytes = std::strtoll(text, &end, 10);
  STD_TORCH_CHECK(errno == 0 && *end == '\0' && megabytes >= 0 && megabytes <= (int64_t{1} << 40),
                  "CTR_KERNELS_CACHE_MB=", std::string(text), ": a number of megabytes is needed, 0 or more");
  return megabytes << 20;
}

OutputCache& output_cache() {
  static OutputCache* const only = new OutputCache;
  return *only;
}

}  // namespace ctr
