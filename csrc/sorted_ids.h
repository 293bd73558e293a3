// The ids of a step brought in order, with the positions they came at.
#pragma once
#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "tensor_args.h"

namespace ctr {

// Position of the first id of [first, last) outside [0, num_rows), or -1.
inline int64_t find_bad(const Ids& ids, int64_t num_rows, int64_t first, int64_t last) {
  constexpr int64_t kBlock = 1024;
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, last);
    bool bad = false;
    if (ids.wide) {
      const auto* p = static_cast<const int64_t*>(ids.data);
      for (int64_t i = begin; i < end; ++i) bad |= static_cast<uint64_t>(p[i]) >= static_cast<uint64_t>(num_rows);
    } else {
      const auto* p = static_cast<const int32_t*>(ids.data);
      for (int64_t i = begin; i < end; ++i) bad |= p[i] < 0 || p[i] >= num_rows;
    }
    for (int64_t i = begin; bad && i < end; ++i)
      if (ids[i] < 0 || ids[i] >= num_rows) return i;
  }
  return -1;
}

[[noreturn]] inline void refuse(const Ids& ids, int64_t num_rows) {
  const int64_t bad = find_bad(ids, num_rows, 0, ids.count);
  STD_TORCH_CHECK(false, "id ", ids[bad], " at position ", bad, " is outside the table of ", num_rows, " rows");
}

// Pairs id << 32 | position in ascending order: a least-significant-digit radix sort on the bits that ids below
// num_rows use, which it checks. Stable, so equal ids keep their order and sums are the same for any number of threads.
// What is scattered to is fetched while the digits are counted, since stores that miss wait for each other: a quarter
// off the sort.
class SortedIds {
 public:
  SortedIds(const Ids& ids, int64_t num_rows)
      : count_(ids.count),
        memory_(new_output({2 * 2 * ids.count}, ScalarType::Float)),
        pairs_(static_cast<uint64_t*>(memory_.mutable_data_ptr())),
        spare_(pairs_ + ids.count) {
    STD_TORCH_CHECK(count_ < (int64_t{1} << 32) && num_rows <= (int64_t{1} << 32),
                    "more than 2^32 ids or rows are not supported");
    chunks_ = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), count_ / 4096));
    if (ids.wide) sort(static_cast<const int64_t*>(ids.data), ids, num_rows);
    else sort(static_cast<const int32_t*>(ids.data), ids, num_rows);
  }

  // A run of equal ids belongs to the task in which it starts: the first start at or after `i`.
  int64_t run_start(int64_t i) const {
    while (i > 0 && i < count_ && pairs_[i] >> 32 == pairs_[i - 1] >> 32) ++i;
    return i;
  }

  // The pairs [begin, end), whole runs, with equal ids side by side. Where most ids come once, those are put roughly in
  // the order of their positions, so that the gradient's rows are read nearly as they lie: a sixth off an update of
  // uniform ids. Called once for a range.
  const uint64_t* grouped(int64_t begin, int64_t end) const {
    const uint64_t* pairs = pairs_ + begin;
    const int64_t n = end - begin;
    int64_t sampled = 0, twins = 0;
    for (int64_t k = 0; k + 1 < n; k += 16, ++sampled) twins += pairs[k] >> 32 == pairs[k + 1] >> 32;
    if (4 * twins >= sampled) return pairs;
    int shift = 0;
    while (count_ >> shift >= int64_t{1} << kMaxBits) ++shift;
    std::vector<uint32_t> offsets((count_ >> shift) + 2);
    const auto walk = [&](const auto& f) {  // f(pair, its bucket): 0 of a run of several, else by position
      constexpr uint64_t kNone = ~uint64_t{0};
      uint64_t before = kNone, here = pairs[0] >> 32;
      for (int64_t k = 0; k < n; ++k) {
        const uint64_t after = k + 1 < n ? pairs[k + 1] >> 32 : kNone;
        const uint64_t single = (here != before) & (here != after);
        f(pairs[k], (1 + ((pairs[k] & 0xFFFFFFFFu) >> shift)) & (0 - single));
        before = here;
        here = after;
      }
    };
    walk([&](uint64_t, uint64_t bucket) { ++offsets[bucket]; });
    uint32_t total = 0;
    for (uint32_t& offset : offsets) total += std::exchange(offset, total);
    uint64_t* out = spare_ + begin;
    walk([&](uint64_t pair, uint64_t bucket) { out[offsets[bucket]++] = pair; });
    return out;
  }

 private:
  static constexpr int kMaxBits = 11;  // 2048 counters and 2048 open cache lines

  template <class F>
  void for_chunks(const F& f) const {
    torch::stable::parallel_for(0, chunks_, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) f(c, count_ * c / chunks_, count_ * (c + 1) / chunks_);
    });
  }

  template <class T>
  void sort(const T* ids, const Ids& all, int64_t num_rows) {
    int bits = 1;
    while ((num_rows - 1) >> bits) ++bits;
    const int passes = (bits + kMaxBits - 1) / kMaxBits;
    for (int pass = 0, low = 0; pass < passes; ++pass) {
      const int width = (bits - low + passes - pass - 1) / (passes - pass);
      if (pass > 0) {
        scatter(low, width, [](int64_t) { return true; }, [from = pairs_](int64_t i) { return from[i]; });
      } else if (!scatter(0, width, [=](int64_t i) { return uint64_t(ids[i]) < uint64_t(num_rows); },
                          [=](int64_t i) { return uint64_t(ids[i]) << 32 | uint64_t(i); })) {
        refuse(all, num_rows);
      }
      low += width;
    }
  }

  // Sorts pair(i) by `width` bits of its id from bit `low` on; false, and nothing done, where one is not good(i).
  template <class Good, class Pair>
  bool scatter(int low, int width, const Good& good, const Pair& pair) {
    const int64_t buckets = int64_t{1} << width;
    const auto bucket_of = [=](uint64_t moved) { return moved >> (32 + low) & (buckets - 1); };
    std::vector<uint32_t> offsets(chunks_ * buckets);
    std::atomic<bool> all_good{true};
    for_chunks([&](int64_t chunk, int64_t begin, int64_t end) {
      uint32_t* own = offsets.data() + chunk * buckets;
      bool here = true;
      for (int64_t i = begin; i < end; ++i) {
        if (i % 8 == 0) __builtin_prefetch(spare_ + i, 1);
        if (i % 8 == 0 && low == 0) __builtin_prefetch(pairs_ + i, 1);
        here &= good(i);
        ++own[bucket_of(pair(i))];
      }
      if (!here) all_good = false;
    });
    if (!all_good) return false;
    uint32_t total = 0;
    for (int64_t bucket = 0; bucket < buckets; ++bucket)
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        uint32_t& offset = offsets[chunk * buckets + bucket];
        total += std::exchange(offset, total);
      }
    for_chunks([&](int64_t chunk, int64_t begin, int64_t end) {
      uint32_t* own = offsets.data() + chunk * buckets;
      uint64_t* to = spare_;
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t moved = pair(i);
        to[own[bucket_of(moved)]++] = moved;
      }
    });
    std::swap(pairs_, spare_);
    return true;
  }

  int64_t count_, chunks_;
  Tensor memory_;  // of both halves
  uint64_t *pairs_, *spare_;
};

}  // namespace ctr
