// The rows of one head, fp32 and read in whole vectors: memory where it allows that, else scratch.
#pragma once
#include <algorithm>

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

// Of outputs that are streamed: whether a head fills whole cache lines, or a sample's outputs are put together in the
// cache first.
inline bool whole_lines(const AttentionArgs& args) { return args.around && args.head_dim % 16 == 0; }
inline bool gathers(const AttentionArgs& args) { return args.around && args.head_dim % 16 != 0; }

// Whether the gradients of q, k and v are columns of one tensor.
inline bool packed(const AttentionArgs& args) { return args.dq.field > args.heads * args.head_dim; }

// Whether outputs are written where they are, too.
inline bool writes_in_place(const AttentionArgs& args) { return in_place(args) && !gathers(args); }

// Where one output's rows of a sample are put together: as in memory, from `column` on of rows of `pitch`. `last`: whether
// they are complete with it.
struct Gathered {
  float* rows;
  int64_t pitch, column;
  bool last;
};

// Scratch for the rows of one head at a time, [queries or keys, padded head] each; none where memory is used in place.
// The sums over blocks of queries are always there. gathered(i): of the i-th output, where a sample's are put together.
class HeadRows {
 public:
  explicit HeadRows(const AttentionArgs& args, bool sums = false)
      : width_(padded_head(args)),
        keys_(writes_in_place(args) && !sums ? 0 : args.keys * width_ + kSpace),
        queries_(writes_in_place(args) ? 0 : args.queries * width_ + kSpace),
        columns_(args.heads * args.head_dim),
        packed_(packed(args)),
        sample_(gathers(args) ? std::max(args.keys, args.queries) * columns_ : 0),
        rows_(4 * keys_ + 3 * queries_),
        sample_rows_(3 * sample_) {}
  float* k() const { return rows_.get(); }
  float* v() const { return k() + keys_; }
  float* dk() const { return v() + keys_; }
  float* dv() const { return dk() + keys_; }
  float* q() const { return dv() + keys_; }
  float* go() const { return q() + queries_; }
  float* out() const { return go() + queries_; }  // of forward; dq of backward
  Gathered gathered(int which) const {
    if (sample_ == 0) return {nullptr, 0, 0, false};
    if (packed_) return {sample_rows_.get(), 3 * columns_, which * columns_, which == 2};
    return {sample_rows_.get() + which * sample_, columns_, 0, true};
  }
  int64_t width() const { return width_; }

 private:
  static constexpr int64_t kSpace = 80;  // see AttentionScratch
  int64_t width_, keys_, queries_, columns_;
  bool packed_;
  int64_t sample_;
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
  if (!writes_in_place(args)) return {scratch, padded_head(args)};
  return {reinterpret_cast<float*>(head_pointer(args, t, sample, head)), t.field};
}
// to[i] = from[i], whole lines around the cache.
inline void copy_around(const float* from, int64_t count, float* to) {
  const int64_t before = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) / 4) & 15;
  const int64_t first = before < count ? before : count, last = first + (count - first) / 16 * 16;
  copy_rows<false>(from, 0, 1, first, to, 0);
  for (int64_t i = first; i < last; i += W) stream(to + i, load(from + i));
  copy_rows<false>(from + last, 0, 1, count - last, to + last, 0);
}

// Scratch to memory, by way of the sample's rows where they are put together; nothing where the view is the memory.
inline void flush(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head, int64_t rows,
                  const View& view, const Gathered& gathered) {
  char* p = head_pointer(args, t, sample, head);
  if (reinterpret_cast<char*>(view.data) == p) return;
  if (gathered.rows == nullptr) return write_rows(args.type, view.data, view.stride, rows, args.head_dim, p, t.field);
  copy_rows<false>(view.data, view.stride, rows, args.head_dim,
                   gathered.rows + gathered.column + head * args.head_dim, gathered.pitch);
  if (head + 1 < args.heads || !gathered.last) return;
  copy_around(gathered.rows, rows * gathered.pitch,
              static_cast<float*>(t.data) + sample * t.batch - gathered.column);
}

// Prefetches a share of the next sample, one of `parts`, whole rows in the order of memory: a head's own lines, one or two
// of every row, are a pattern that the hardware does not foresee. Kernels ask for a tensor at a time, between products:
// in one burst more lines would be asked for than can be under way, and the core would wait.
struct NextSample {
  const AttentionArgs& args;
  int64_t sample, part, parts;
  __attribute__((always_inline)) void fetch(const Strided& t, int64_t rows) const {
    if (args.cached || sample + 1 >= args.samples) return;
    const int64_t size = element_size(args.type), width = args.heads * args.head_dim * size;
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r)
      prefetch(static_cast<const char*>(t.data) + ((sample + 1) * t.batch + r * t.field) * size, width);
  }
  // Outputs that are not streamed.
  __attribute__((always_inline)) void fetch_output(const Strided& t, int64_t rows) const {
    if (!args.around) fetch(t, rows);
  }
};

}  // namespace CTR_ISA
}  // namespace ctr
