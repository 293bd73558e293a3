// ctr::embedding_lookup, and the updates of the rows that a step touched, on CPUs.
#include <algorithm>
#include <cstring>
#include <memory>

#include "tensor_args.h"

namespace ctr {
namespace {

// int32 or int64 ids, contiguous.
struct Ids {
  const void* data;
  int64_t count;
  bool wide;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

Ids ids_of(const Tensor& ids) {
  const ScalarType type = ids.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "ids must be int32 or int64");
  STD_TORCH_CHECK(ids.is_contiguous(), "ids must be contiguous");
  return {ids.const_data_ptr(), ids.numel(), type == ScalarType::Long};
}

// Position of the first id outside [0, num_rows), or -1.
int64_t find_bad(const Ids& ids, int64_t num_rows) {
  constexpr int64_t kBlock = 1024;
  for (int64_t begin = 0; begin < ids.count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, ids.count);
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

void check_ids(const Ids& ids, int64_t num_rows) {
  const int64_t bad = find_bad(ids, num_rows);
  STD_TORCH_CHECK(bad < 0, "id ", ids[bad], " at position ", bad, " is outside the table of ", num_rows, " rows");
}

// Pairs id << 32 | position in ascending order: a least-significant-digit radix sort on the bits that ids below
// num_rows use. Stable, so equal ids keep their order and sums are the same for any number of threads.
class SortedIds {
 public:
  SortedIds(const Ids& ids, int64_t num_rows) : count_(ids.count), pairs_(new uint64_t[ids.count]) {
    STD_TORCH_CHECK(count_ < (int64_t{1} << 32) && num_rows <= (int64_t{1} << 32),
                    "more than 2^32 ids or rows are not supported");
    chunks_ = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), count_ / 4096));
    for_chunks([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        pairs_[i] = static_cast<uint64_t>(ids[i]) << 32 | static_cast<uint64_t>(i);
    });
    int bits = 0;
    while ((num_rows - 1) >> bits) ++bits;
    const int passes = (bits + kMaxBits - 1) / kMaxBits;
    for (int pass = 0, low = 0; pass < passes; ++pass) {
      const int width = (bits - low + passes - pass - 1) / (passes - pass);
      scatter(32 + low, width);
      low += width;
    }
  }
  const uint64_t* data() const { return pairs_.get(); }
  int64_t count() const { return count_; }

 private:
  static constexpr int kMaxBits = 11;  // 2048 counters and 2048 open cache lines

  template <class F>
  void for_chunks(const F& f) const {
    torch::stable::parallel_for(0, chunks_, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) f(c, count_ * c / chunks_, count_ * (c + 1) / chunks_);
    });
  }

  void scatter(int shift, int width) {
    const int64_t buckets = int64_t{1} << width;
    const uint64_t mask = buckets - 1;
    if (!spare_) spare_.reset(new uint64_t[count_]);
    std::vector<int64_t> offsets(chunks_ * buckets);
    for_chunks([&](int64_t chunk, int64_t begin, int64_t end) {
      int64_t* own = offsets.data() + chunk * buckets;
      for (int64_t i = begin; i < end; ++i) ++own[pairs_[i] >> shift & mask];
    });
    int64_t total = 0;
    for (int64_t bucket = 0; bucket < buckets; ++bucket)
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const int64_t here = offsets[chunk * buckets + bucket];
        offsets[chunk * buckets + bucket] = total;
        total += here;
      }
    for_chunks([&](int64_t chunk, int64_t begin, int64_t end) {
      int64_t* own = offsets.data() + chunk * buckets;
      for (int64_t i = begin; i < end; ++i) spare_[own[pairs_[i] >> shift & mask]++] = pairs_[i];
    });
    pairs_.swap(spare_);
  }

  int64_t count_, chunks_;
  std::unique_ptr<uint64_t[]> pairs_, spare_;
};

// A run of equal ids belongs to the task in which it starts.
int64_t run_start(const SortedIds& sorted, int64_t i) {
  const uint64_t* pairs = sorted.data();
  while (i > 0 && i < sorted.count() && pairs[i] >> 32 == pairs[i - 1] >> 32) ++i;
  return i;
}

void update(const Tensor& weight, float* state, const Tensor& ids, const Tensor& rows, double lr, double eps) {
  check_type(weight, ScalarType::Float, "weight");
  check_type(rows, ScalarType::Float, "rows");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be [num_rows, dim] and contiguous");
  const int64_t num_rows = weight.size(0), dim = weight.size(1);
  const Ids all = ids_of(ids);
  check_shape(rows, {all.count, dim}, "rows");
  STD_TORCH_CHECK(rows.is_contiguous(), "rows must be contiguous");
  if (all.count == 0) return;
  check_ids(all, num_rows);
  const SortedIds sorted(all, num_rows);
  const RowUpdate args{static_cast<float*>(weight.mutable_data_ptr()), state,
                       static_cast<const float*>(rows.const_data_ptr()), dim, static_cast<float>(lr),
                       static_cast<float>(eps)};
  const KernelTable& kernels = kernels_for(0);
  constexpr int64_t kTask = 2048;
  const int64_t tasks = (all.count + kTask - 1) / kTask;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = run_start(sorted, first * kTask);
    const int64_t end = run_start(sorted, std::min(last * kTask, all.count));
    if (begin < end) kernels.update_rows(args, sorted.data() + begin, end - begin);
  });
}

}  // namespace

// For a table just allocated: its rows come in random order, and 4 KB pages then miss the TLB at nearly every row.
void use_huge_pages(Tensor table) { prefer_huge_pages(table); }

int64_t first_bad_id(Tensor ids, int64_t num_rows) { return find_bad(ids_of(ids), num_rows); }

// weight [num_rows, dim] of any dtype, ids of any shape [...] -> [..., dim].
Tensor embedding_lookup(Tensor weight, Tensor ids) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be [num_rows, dim] and contiguous");
  const Ids all = ids_of(ids);
  check_ids(all, weight.size(0));
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(weight.size(1));
  Tensor out = new_output(shape, weight.scalar_type());
  const int64_t bytes = weight.size(1) * static_cast<int64_t>(weight.element_size());
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, all.count, 512, [&](int64_t first, int64_t last) {
    constexpr int64_t kAhead = 16;
    for (int64_t i = first; i < last; ++i) {
      if (i + kAhead < last)
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + all[i + kAhead] * bytes + b, 0, 3);
      std::memcpy(to + i * bytes, from + all[i] * bytes, bytes);
    }
  });
  return out;
}

// weight[r] -= lr * (sum of the rows whose id is r), in place.
void sparse_sgd(Tensor weight, Tensor ids, Tensor rows, double lr) { update(weight, nullptr, ids, rows, lr, 0.0); }

// state[r] += mean(g_r^2); weight[r] -= lr * g_r / (sqrt(state[r]) + eps), in place.
void sparse_rowwise_adagrad(Tensor weight, Tensor state, Tensor ids, Tensor rows, double lr, double eps) {
  check_type(state, ScalarType::Float, "state");
  check_shape(state, {weight.size(0)}, "state");
  STD_TORCH_CHECK(state.is_contiguous(), "state must be contiguous");
  update(weight, static_cast<float*>(state.mutable_data_ptr()), ids, rows, lr, eps);
}

}  // namespace ctr
