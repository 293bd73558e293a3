// Memory of freed outputs, kept for the next ones: memory that the system gives anew is zeroed page by page.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>

namespace ctr {

constexpr int64_t kHugePage = int64_t{2} << 20;  // bytes

// Asks for huge pages, where the system offers them, for what lies wholly in memory that has not been touched yet.
void advise_huge_pages(void* data, int64_t bytes);

struct Block {
  char* data;     // at a huge page
  int64_t bytes;  // whole huge pages
};

struct OutputCacheStats {
  int64_t kept, in_use, most_in_use;  // bytes; what is kept and in use together is never more than the third
};

// Blocks are cut from what is kept, and grow together again with their neighbours when they are given back. What a step
// needed once is therefore there for the same step again, whatever the sizes between.
class OutputCache {
 public:
  Block take(int64_t bytes);
  void give(Block block);
  // Sets how many bytes are kept at most, unless negative; returns what was set before.
  int64_t limit(int64_t bytes);
  // Gives all that is kept back to the system, and forgets how much was in use before.
  void empty();
  OutputCacheStats stats();

 private:
  struct Kept {
    int64_t bytes;
    uint64_t since;  // the number of the `give` that brought its youngest part
  };

  void release(int64_t most);

  std::mutex mutex_;
  std::map<char*, Kept> free_;  // by address; no two of them touch
  int64_t kept_ = 0, in_use_ = 0, most_in_use_ = 0, limit_ = initial_limit();
  uint64_t given_ = 0;

  static int64_t initial_limit();
};

// The one of this process, never destroyed: tensors may be freed after everything else.
OutputCache& output_cache();

}  // namespace ctr
