// One pass over sorted (id, position) pairs: the duplicates of a row are summed, then the row is read and written
// once. Rows come in random order, so those a few pairs ahead are prefetched.
#pragma once
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace ctr {
namespace CTR_ISA {

constexpr int64_t kAhead = 8;        // pairs; more of them lose lines again before they are used
constexpr int64_t kMaxRowFloats = 1024;  // of a sum kept on the stack at a time

inline int64_t id_of(uint64_t pair) { return static_cast<int64_t>(pair >> 32); }
inline int64_t position_of(uint64_t pair) { return static_cast<int64_t>(pair & 0xFFFFFFFFu); }

// Always inlined: GCC takes a function that only prefetches for one without effect, and drops the call.
__attribute__((always_inline)) inline void prefetch_row(const float* row, int64_t dim, bool write) {
  for (int64_t c = 0; c < dim; c += 16) {
    if (write) __builtin_prefetch(row + c, 1, 3);
    else __builtin_prefetch(row + c, 0, 3);
  }
}

// out[0..width) = the sum of the run's rows from column `first` on, in fp32, in order of position.
inline void sum_run(const RowUpdate& args, const uint64_t* run, int64_t length, int64_t first, int64_t width,
                    float* out) {
  const float* row = args.rows + position_of(run[0]) * args.dim + first;
  std::memcpy(out, row, width * sizeof(float));
  for (int64_t i = 1; i < length; ++i) {
    if (i + kAhead < length) prefetch_row(args.rows + position_of(run[i + kAhead]) * args.dim + first, width, false);
    row = args.rows + position_of(run[i]) * args.dim + first;
    int64_t c = 0;
    for (; c + W <= width; c += W) store(out + c, load(out + c) + load(row + c));
    for (; c < width; ++c) out[c] += row[c];
  }
}

inline void descend(float* weight, const float* grad, int64_t width, float step) {
  int64_t c = 0;
  for (; c + W <= width; c += W) store(weight + c, load(weight + c) - load(grad + c) * step);
  for (; c < width; ++c) weight[c] -= grad[c] * step;
}

inline float sum_of_squares(const float* grad, int64_t width) {
  Vec sum = {};
  int64_t c = 0;
  for (; c + W <= width; c += W) sum += load(grad + c) * load(grad + c);
  float total = sum_lanes(sum)[0];
  for (; c < width; ++c) total += grad[c] * grad[c];
  return total;
}

inline void update_row(const RowUpdate& args, const uint64_t* run, int64_t length) {
  const int64_t id = id_of(run[0]);
  alignas(64) float sum[kMaxRowFloats];
  float step = args.lr;
  if (args.state != nullptr) {
    float squares = 0.0f;
    for (int64_t first = 0; first < args.dim; first += kMaxRowFloats) {
      const int64_t width = args.dim - first < kMaxRowFloats ? args.dim - first : kMaxRowFloats;
      sum_run(args, run, length, first, width, sum);
      squares += sum_of_squares(sum, width);
    }
    args.state[id] += squares / static_cast<float>(args.dim);
    step = args.lr / (std::sqrt(args.state[id]) + args.eps);
  }
  for (int64_t first = 0; first < args.dim; first += kMaxRowFloats) {
    const int64_t width = args.dim - first < kMaxRowFloats ? args.dim - first : kMaxRowFloats;
    float* weight = args.weight + id * args.dim + first;
    if (length == 1) {
      descend(weight, args.rows + position_of(run[0]) * args.dim + first, width, step);
      continue;
    }
    if (args.state == nullptr || args.dim > kMaxRowFloats) sum_run(args, run, length, first, width, sum);
    descend(weight, sum, width, step);
  }
}

inline void update_rows(const RowUpdate& args, const uint64_t* sorted, int64_t n) {
  int64_t fetched = 0;
  for (int64_t first = 0; first < n;) {
    for (; fetched < n && fetched <= first + kAhead; ++fetched) {
      prefetch_row(args.rows + position_of(sorted[fetched]) * args.dim, args.dim, false);
      prefetch_row(args.weight + id_of(sorted[fetched]) * args.dim, args.dim, true);
      if (args.state != nullptr) __builtin_prefetch(args.state + id_of(sorted[fetched]), 1, 3);
    }
    int64_t last = first + 1;
    while (last < n && id_of(sorted[last]) == id_of(sorted[first])) ++last;
    update_row(args, sorted + first, last - first);
    first = last;
  }
}

}  // namespace CTR_ISA
}  // namespace ctr
