// The rows of one head, fp32 and read in whole vectors: memory where it allows that, else scratch.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "buffer.h"
#include "convert.h"
#include "kernels.h"
#include "prefetch.h"

namespace ctr {
namespace CTR_ISA {

struct View {
  float* data;
  int64_t stride;  // between rows
};

inline int64_t element_size(Type type) { return type == Type::f32 ? 4 : 2; }

// The head's width rounded up to whole vectors.
inline int64_t padded_head(const AttentionArgs& args) { return (args.head_dim + W - 1) / W * W; }

// Whether memory is read and written where it is.
inline bool in_place(const AttentionArgs& args) { return args.type == Type::f32 && args.head_dim % W == 0; }

// Whether a sample's outputs are put together in the cache and then written around it: those whose heads share lines.
inline bool gathers(const AttentionArgs& args) { return args.around && args.head_dim % 16 != 0; }

// Scratch for the rows of one head at a time, [queries or keys, padded head] each; none where memory is used in place. The
// sums over blocks of queries are always there. `sample_rows`: of one sample's outputs, where they are gathered.
class HeadRows {
 public:
  explicit HeadRows(const AttentionArgs& args, bool sums = false)
      : width_(padded_head(args)),
        keys_(in_place(args) && !sums && !gathers(args) ? 0 : args.keys * width_ + kSpace),
        queries_(in_place(args) && !gathers(args) ? 0 : args.queries * width_ + kSpace),
        sample_(gathers(args) ? std::max(args.keys, args.queries) * args.heads * args.head_dim : 0),
        rows_(4 * keys_ + 3 * queries_),
        sample_rows_(3 * sample_) {}
  float* k() const { return rows_.get(); }
  float* v() const { return k() + keys_; }
  float* dk() const { return v() + keys_; }
  float* dv() const { return dk() + keys_; }
  float* q() const { return dv() + keys_; }
  float* go() const { return q() + queries_; }
  float* out() const { return go() + queries_; }  // of forward; dq of backward
  float* sample_rows(int which) const { return sample_ == 0 ? nullptr : sample_rows_.get() + which * sample_; }
  int64_t width() const { return width_; }

 private:
  static constexpr int64_t kSpace = 80;  // see AttentionScratch
  int64_t width_, keys_, queries_, sample_;
  Buffer rows_, sample_rows_;
};

inline char* head_pointer(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head) {
  return static_cast<char*>(t.data) + (sample * t.batch + head * args.head_dim) * element_size(args.type);
}

// With zeros behind the head up to whole vectors.
inline View padded_input(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head, int64_t rows,
                         float* scratch) {
  char* p = head_pointer(args, t, sample, head);
  if (in_place(args)) return {reinterpret_cast<float*>(p), t.field};
  const int64_t width = padded_head(args);
  read_rows(args.type, p, t.field, rows, args.head_dim, scratch, width);
  return {scratch, width};
}

// With anything behind the head: a product has it in columns of its own. fp32 is read in place, the last head but where its
// last vector would end behind the tensor.
inline View input(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head, int64_t rows,
                  float* scratch) {
  const int64_t behind = (args.samples - 1 - sample) * t.batch + (args.heads - head) * args.head_dim;
  if (args.type != Type::f32 || behind < padded_head(args)) return padded_input(args, t, sample, head, rows, scratch);
  return {reinterpret_cast<float*>(head_pointer(args, t, sample, head)), t.field};
}
inline View output(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head, float* scratch) {
  if (!in_place(args) || gathers(args)) return {scratch, padded_head(args)};
  return {reinterpret_cast<float*>(head_pointer(args, t, sample, head)), t.field};
}
// Scratch to memory, by way of the sample's rows where there are some; nothing where the view is the memory.
inline void flush(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head, int64_t rows,
                  const View& view, float* sample_rows) {
  char* p = head_pointer(args, t, sample, head);
  if (reinterpret_cast<char*>(view.data) == p) return;
  if (sample_rows == nullptr) return write_rows(args.type, view.data, view.stride, rows, args.head_dim, p, t.field);
  const int64_t width = args.heads * args.head_dim;
  write_rows(args.type, view.data, view.stride, rows, args.head_dim, sample_rows + head * args.head_dim, width);
  if (head + 1 < args.heads) return;
  float* to = static_cast<float*>(t.data) + sample * t.batch;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; c += W) stream(to + r * t.field + c, load(sample_rows + r * width + c));
}

// Prefetches a head's share of the next sample, whole rows in the order of memory: a head's own lines, one or two of
// every row, are a pattern that the hardware does not foresee.
__attribute__((always_inline)) inline void prefetch_next(const AttentionArgs& args, int64_t rows,
                                                         std::initializer_list<const Strided*> tensors,
                                                         int64_t sample, int64_t head) {
  if (args.cached || sample + 1 >= args.samples) return;
  const int64_t size = element_size(args.type), width = args.heads * args.head_dim * size;
  for (int64_t r = rows * head / args.heads; r < rows * (head + 1) / args.heads; ++r)
    for (const Strided* t : tensors)
      prefetch(static_cast<const char*>(t->data) + ((sample + 1) * t->batch + r * t->field) * size, width);
}

}  // namespace CTR_ISA
}  // namespace ctr
