// The rows of one head, fp32 and whole vectors wide: memory where it is so already, else scratch with zeros behind the head.
#pragma once
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

// Whether memory is used where it is.
inline bool in_place(const AttentionArgs& args) { return args.type == Type::f32 && args.head_dim % W == 0; }

// Scratch for the rows of one head at a time, [queries or keys, padded head] each; none where memory is used in place. The
// sums over blocks of queries are always there.
class HeadRows {
 public:
  explicit HeadRows(const AttentionArgs& args, bool sums = false)
      : width_(padded_head(args)),
        keys_(in_place(args) && !sums ? 0 : args.keys * width_ + kSpace),
        queries_(in_place(args) ? 0 : args.queries * width_ + kSpace),
        rows_(4 * keys_ + 3 * queries_) {}
  float* k() const { return rows_.get(); }
  float* v() const { return k() + keys_; }
  float* dk() const { return v() + keys_; }
  float* dv() const { return dk() + keys_; }
  float* q() const { return dv() + keys_; }
  float* go() const { return q() + queries_; }
  float* out() const { return go() + queries_; }  // of forward; dq of backward
  int64_t width() const { return width_; }

 private:
  static constexpr int64_t kSpace = 80;  // see AttentionScratch
  int64_t width_, keys_, queries_;
  Buffer rows_;
};

inline char* head_pointer(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head) {
  return static_cast<char*>(t.data) + (sample * t.batch + head * args.head_dim) * element_size(args.type);
}

inline View input(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head, int64_t rows,
                  float* scratch) {
  char* p = head_pointer(args, t, sample, head);
  if (in_place(args)) return {reinterpret_cast<float*>(p), t.field};
  const int64_t width = padded_head(args);
  read_rows(args.type, p, t.field, rows, args.head_dim, scratch, width);
  return {scratch, width};
}
inline View output(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head, float* scratch) {
  if (!in_place(args)) return {scratch, padded_head(args)};
  return {reinterpret_cast<float*>(head_pointer(args, t, sample, head)), t.field};
}
// Scratch to memory; nothing where the view is the memory.
inline void flush(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head, int64_t rows,
                  const View& view) {
  char* p = head_pointer(args, t, sample, head);
  if (reinterpret_cast<char*>(view.data) == p) return;
  write_rows(args.type, view.data, view.stride, rows, args.head_dim, p, t.field);
}

// Prefetches a head's share of the next sample, whole rows in the order of memory: a head's own lines, one or two of
// every row, are a pattern that the hardware does not foresee.
__attribute__((always_inline)) inline void prefetch_next(const AttentionArgs& args, int64_t rows,
                                                         std::initializer_list<const Strided*> tensors,
                                                         int64_t sample, int64_t head) {
  if (sample + 1 >= args.samples) return;
  const int64_t size = element_size(args.type), width = args.heads * args.head_dim * size;
  for (int64_t r = rows * head / args.heads; r < rows * (head + 1) / args.heads; ++r)
    for (const Strided* t : tensors)
      prefetch(static_cast<const char*>(t->data) + ((sample + 1) * t->batch + r * t->field) * size, width);
}

}  // namespace CTR_ISA
}  // namespace ctr
