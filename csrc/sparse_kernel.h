// The lookup of rows, and their update: one pass over sorted (id, position) pairs, where the duplicates of a row are
// summed, then the row is read and written once. Rows come in random order, so those some pairs ahead are prefetched.
#pragma once
#include <cmath>

#include "convert.h"
#include "kernels.h"
#include "philox_vector.h"
#include "prefetch.h"
#include "simd.h"

namespace ctr {
namespace CTR_ISA {

constexpr int64_t kMaxRowFloats = 1024;  // of a row worked on at a time, so that its sums fit on the stack

inline int64_t id_of(uint64_t pair) { return static_cast<int64_t>(pair >> 32); }
inline int64_t position_of(uint64_t pair) { return static_cast<int64_t>(pair & 0xFFFFFFFFu); }
inline int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

inline char* element(const void* data, Type type, int64_t index) {
  return const_cast<char*>(static_cast<const char*>(data)) + index * size_of(type);
}

__attribute__((always_inline)) inline void prefetch_row(const void* data, Type type, int64_t row, int64_t dim) {
  prefetch(element(data, type, row * dim), dim * size_of(type));
}

inline void lookup_rows(const RowLookup& args, int64_t first, int64_t last) {
  const Ids& ids = args.ids;
  const int64_t bytes = args.bytes, ahead = rows_ahead(bytes);
  for (int64_t i = first; i < first + ahead && i < last; ++i) prefetch(args.table + ids[i] * bytes, bytes);
  for (int64_t i = first; i < last; ++i) {
    if (i + ahead < last) prefetch(args.table + ids[i + ahead] * bytes, bytes);
    const char* row = args.table + ids[i] * bytes;
    if (args.around) {
      char* to = args.out + i * bytes;
      for (int64_t b = 0; b < bytes; b += W * 4)
        stream(reinterpret_cast<float*>(to + b), load(reinterpret_cast<const float*>(row + b)));
    } else if (!args.widen) {
      std::memcpy(args.out + i * bytes, row, bytes);
    } else {
      const auto* packed = reinterpret_cast<const uint16_t*>(row);
      auto* wide = reinterpret_cast<uint32_t*>(args.out) + i * args.dim;
      for (int64_t c = 0; c < args.dim; ++c) wide[c] = static_cast<uint32_t>(packed[c]) << 16;
    }
  }
  finish_streams();
}

// What the update of the pairs ahead of the one at hand will touch is fetched once, through runs of any length.
template <RowRule rule>
class Ahead {
 public:
  Ahead(const RowUpdate& args, const uint64_t* sorted, int64_t n)
      : args_(args), next_(sorted), end_(sorted + n), pairs_(rows_ahead(args.dim * size_of(args.rows_type))) {}
  __attribute__((always_inline)) void of(const uint64_t* pair) {
    const uint64_t* stop = end_ - pair > pairs_ ? pair + pairs_ + 1 : end_;
    for (; next_ < stop; ++next_) fetch(id_of(*next_), position_of(*next_));
  }

 private:
  __attribute__((always_inline)) void fetch(int64_t id, int64_t position) {
    prefetch_row(args_.rows, args_.rows_type, position, args_.dim);
    if (id == fetched_) return;
    fetched_ = id;
    prefetch_row(args_.weight, args_.weight_type, id, args_.dim);
    if (rule == RowRule::rowwise_adagrad) __builtin_prefetch(static_cast<float*>(args_.first) + id, 0, 2);
    if (rule == RowRule::adagrad || rule == RowRule::lazy_adam)
      prefetch_row(args_.first, args_.state_type, id, args_.dim);
    if (rule == RowRule::lazy_adam) prefetch_row(args_.second, args_.state_type, id, args_.dim);
    if (args_.last != nullptr) __builtin_prefetch(args_.last + id, 0, 2);
  }

  const RowUpdate& args_;
  const uint64_t *next_, *end_;
  int64_t pairs_, fetched_ = -1;
};

// 16 bits for each of the columns [first, first + width) of a row, as rule.py draws them; first is a multiple of 8,
// and out has room for width rounded up to a multiple of 8 kPairs.
inline void rounding_bits(const RowUpdate& args, int which, int64_t id, int64_t first, int64_t width, uint32_t* out) {
  const uint64_t groups = static_cast<uint64_t>(args.dim + 7) / 8;
  uint64_t counter = (which * static_cast<uint64_t>(args.num_rows) + id) * groups + first / 8;
  U64 lanes;
  for (int lane = 0; lane < kPairs; ++lane) lanes[lane] = lane;
  for (int64_t c = 0; c < width; c += 8 * kPairs, counter += kPairs) {
    const PhiloxWords words = philox_pairs(args.key, lanes + counter);
    uint64_t drawn[4][kPairs];
    for (int w = 0; w < 4; ++w) std::memcpy(drawn[w], &words.word[w], sizeof(U64));
    for (int lane = 0; lane < kPairs; ++lane)
      for (int w = 0; w < 4; ++w) {
        const uint32_t word = static_cast<uint32_t>(drawn[w][lane]);
        out[c + lane * 8 + 2 * w] = word & 0xFFFFu;
        out[c + lane * 8 + 2 * w + 1] = word >> 16;
      }
  }
}

// Part of a row in fp32: the memory itself where it is fp32, else a copy that is rounded back at the end.
class RowPart {
 public:
  RowPart(const RowUpdate& args, void* data, Type type, int which, int64_t id, int64_t first, int64_t width)
      : args_(args), which_(which), id_(id), first_(first), width_(width) {
    char* memory = element(data, type, id * args.dim + first);
    if (type == Type::f32) {
      values_ = reinterpret_cast<float*>(memory);
    } else {
      packed_ = reinterpret_cast<uint16_t*>(memory);
      values_ = copy_;
      for (int64_t c = 0; c < width; ++c) copy_[c] = from_bf16(packed_[c]);
    }
  }
  float* values() { return values_; }
  void write_back() {
    if (packed_ == nullptr) return;
    uint32_t noise[kMaxRowFloats];
    rounding_bits(args_, which_, id_, first_, width_, noise);
    for (int64_t c = 0; c < width_; ++c) {
      uint32_t bits;
      std::memcpy(&bits, copy_ + c, 4);
      const bool finite = (bits & 0x7F800000u) != 0x7F800000u, nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
      bits += finite ? noise[c] : 0u;
      packed_[c] = static_cast<uint16_t>(bits >> 16 | (nan ? 0x40u : 0u));
    }
  }

 private:
  const RowUpdate& args_;
  int which_;
  int64_t id_, first_, width_;
  float* values_;
  uint16_t* packed_ = nullptr;
  alignas(64) float copy_[kMaxRowFloats];
};

// The sum of the run's rows, columns [first, first + width), in fp32, in order of position: the row itself where it is
// the only one and fp32, else out.
template <RowRule rule>
const float* sum_run(const RowUpdate& args, Ahead<rule>& ahead, const uint64_t* run, int64_t length, int64_t first,
                     int64_t width, float* out) {
  ahead.of(run);
  const auto at = [&](int64_t i) { return element(args.rows, args.rows_type, position_of(run[i]) * args.dim + first); };
  if (args.rows_type == Type::f32 && length == 1) return reinterpret_cast<const float*>(at(0));
  if (args.rows_type == Type::f32) std::memcpy(out, at(0), width * sizeof(float));
  else read_rows(Type::bf16, at(0), 0, 1, width, out, width);
  for (int64_t i = 1; i < length; ++i) {
    ahead.of(run + i);
    if (args.rows_type == Type::bf16) {
      const auto* row = reinterpret_cast<const uint16_t*>(at(i));
      for (int64_t c = 0; c < width; ++c) out[c] += from_bf16(row[c]);
      continue;
    }
    const auto* row = reinterpret_cast<const float*>(at(i));
    int64_t c = 0;
    for (; c + W <= width; c += W) store(out + c, load(out + c) + load(row + c));
    for (; c < width; ++c) out[c] += row[c];
  }
  return out;
}

inline void descend(float* weight, const float* grad, int64_t width, float step, float keep) {
  int64_t c = 0;
  for (; c + W <= width; c += W) store(weight + c, load(weight + c) * keep - load(grad + c) * step);
  for (; c < width; ++c) weight[c] = weight[c] * keep - grad[c] * step;
}

inline float sum_of_squares(const float* grad, int64_t width) {
  Vec sum = {};
  int64_t c = 0;
  for (; c + W <= width; c += W) sum += load(grad + c) * load(grad + c);
  float total = sum_lanes(sum)[0];
  for (; c < width; ++c) total += grad[c] * grad[c];
  return total;
}

// The step of rowwise Adagrad, after the squares of all columns are known; grad: the sum of the last columns.
template <RowRule rule>
float rowwise_step(const RowUpdate& args, Ahead<rule>& ahead, const uint64_t* run, int64_t length, float* sum,
                   const float*& grad) {
  float squares = 0.0f;
  for (int64_t first = 0; first < args.dim; first += kMaxRowFloats) {
    const int64_t width = args.dim - first < kMaxRowFloats ? args.dim - first : kMaxRowFloats;
    grad = sum_run(args, ahead, run, length, first, width, sum);
    squares += sum_of_squares(grad, width);
  }
  float& total = static_cast<float*>(args.first)[id_of(run[0])];
  total += squares / static_cast<float>(args.dim);
  return args.rate / (std::sqrt(total) + args.eps);
}

inline float keep_of(const RowUpdate& args, int64_t id) {
  if (args.last == nullptr) return args.keep;
  const int32_t steps = args.step - args.last[id];
  args.last[id] = args.step;
  return steps == 1 ? args.keep : static_cast<float>(std::exp2(steps * args.log2_keep));
}

template <RowRule rule>
void update_row(const RowUpdate& args, Ahead<rule>& ahead, const uint64_t* run, int64_t length) {
  const int64_t id = id_of(run[0]);
  alignas(64) float sum[kMaxRowFloats];
  const float keep = keep_of(args, id);
  const float* grad = nullptr;
  const float step = rule == RowRule::rowwise_adagrad ? rowwise_step(args, ahead, run, length, sum, grad) : args.rate;
  for (int64_t first = 0; first < args.dim; first += kMaxRowFloats) {
    const int64_t width = args.dim - first < kMaxRowFloats ? args.dim - first : kMaxRowFloats;
    if (grad == nullptr || args.dim > kMaxRowFloats) grad = sum_run(args, ahead, run, length, first, width, sum);
    RowPart row(args, args.weight, args.weight_type, 0, id, first, width);
    float* __restrict weight = row.values();
    if constexpr (rule == RowRule::adagrad) {
      float* __restrict total = static_cast<float*>(args.first) + id * args.dim + first;
      for (int64_t c = 0; c < width; ++c) {
        total[c] += grad[c] * grad[c];
        weight[c] = weight[c] * keep - step * (grad[c] / (std::sqrt(total[c]) + args.eps));
      }
    } else if constexpr (rule == RowRule::lazy_adam) {
      RowPart first_moment(args, args.first, args.state_type, 1, id, first, width);
      RowPart second_moment(args, args.second, args.state_type, 2, id, first, width);
      float* __restrict mean = first_moment.values();
      float* __restrict square = second_moment.values();
      for (int64_t c = 0; c < width; ++c) {
        mean[c] += args.fresh1 * (grad[c] - mean[c]);
        square[c] += args.fresh2 * (grad[c] * grad[c] - square[c]);
        weight[c] = weight[c] * keep - step * (mean[c] / (std::sqrt(square[c]) + args.eps));
      }
      first_moment.write_back();
      second_moment.write_back();
    } else {
      descend(weight, grad, width, step, keep);
    }
    row.write_back();
  }
}

template <RowRule rule>
void update_rows_by(const RowUpdate& args, const uint64_t* sorted, int64_t n) {
  Ahead<rule> ahead(args, sorted, n);
  for (int64_t first = 0; first < n;) {
    int64_t last = first + 1;
    while (last < n && id_of(sorted[last]) == id_of(sorted[first])) ++last;
    update_row(args, ahead, sorted + first, last - first);
    first = last;
  }
}

inline void update_rows(const RowUpdate& args, const uint64_t* sorted, int64_t n) {
  switch (args.rule) {
    case RowRule::sgd: return update_rows_by<RowRule::sgd>(args, sorted, n);
    case RowRule::rowwise_adagrad: return update_rows_by<RowRule::rowwise_adagrad>(args, sorted, n);
    case RowRule::adagrad: return update_rows_by<RowRule::adagrad>(args, sorted, n);
    case RowRule::lazy_adam: return update_rows_by<RowRule::lazy_adam>(args, sorted, n);
  }
}

}  // namespace CTR_ISA
}  // namespace ctr
