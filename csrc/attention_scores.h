// The maps of one head's scores, [key, query]: products, softmax over the keys and its gradient.
#pragma once
#include <cmath>

#include "attention_heads.h"
#include "gemm.h"

namespace ctr {
namespace CTR_ISA {

// Maps [key, query] and transposed inputs have the smallest pitch that holds a block of queries: rows that leave a gap
// would use a part of the first-level cache's sets only. The space between two maps keeps what is read and written at one
// place of both from looking like the same address, of which the processor compares the lowest 12 bits first.
template <int64_t kPitch>
struct alignas(64) AttentionScratch {
  static constexpr int64_t kMap = kMaxKeys * kPitch, kSpace = 80;
  float transposed[kMaxHead * kPitch], space0[kSpace], p[kMap], space1[kSpace], dp[kMap], space2[kSpace], mask[kMap];
  float top[kPitch], total[kPitch], inverse[kPitch], dot[kPitch];  // of each query
};

// Long sums are taken in parts of that many terms, which round less.
constexpr int64_t kPart = 16;

// What is made of a product's tiles: out = sum, and top[n] is the column's largest sum so far.
struct StoreMax {
  float* out;
  int64_t pitch;
  float* top;
  void begin(int64_t columns) const {
    for (int64_t n = 0; n < columns; n += W) store(top + n, splat(-INFINITY));
  }
  void operator()(int64_t m, int64_t n, Vec sum) const { store(out + m * pitch + n, sum); }
};
template <int R, int NV>
__attribute__((always_inline)) inline void reduce(const StoreMax& to, int64_t, int64_t n, const Vec* sums) {
  Vec top[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) top[v] = load(to.top + n + v * W);
#pragma GCC unroll 32
  for (int i = 0; i < R * NV; ++i) top[i % NV] = vmax(top[i % NV], sums[i]);
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) store(to.top + n + v * W, top[v]);
}

// out = sum, times the mask if there is one, and dot[n] is the column's sum of weight * out so far.
template <bool kMasked>
struct StoreDot {
  float* out;
  int64_t pitch;  // of weight and mask, too
  const float *weight, *mask;
  float* dot;
  void begin(int64_t columns) const {
    for (int64_t n = 0; n < columns; n += W) store(dot + n, Vec{});
  }
  void operator()(int64_t m, int64_t n, Vec sum) const {
    store(out + m * pitch + n, kMasked ? sum * load(mask + m * pitch + n) : sum);
  }
};
template <int R, int NV, bool kMasked>
__attribute__((always_inline)) inline void reduce(const StoreDot<kMasked>& to, int64_t m, int64_t n, const Vec* sums) {
  Vec dot[NV] = {};
#pragma GCC unroll 32
  for (int i = 0; i < R * NV; ++i) {
    const int64_t at = (m + i / NV) * to.pitch + n + i % NV * W;
    const Vec weight = load(to.weight + at);
    dot[i % NV] += (kMasked ? weight * load(to.mask + at) : weight) * sums[i];
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) store(to.dot + n + v * W, load(to.dot + n + v * W) + dot[v]);
}

// finish gets map [key, query] = rows [key, depth] times transposed [depth, query]. Of a few queries, sums over wide heads
// are taken in parts: matrix libraries add them up in vectors there, and one long chain would err several times as much.
template <int64_t kPitch, class Finish>
inline void score_products(int64_t keys, int64_t queries, int64_t depth, const View& rows, const float* transposed,
                           Finish finish) {
  constexpr int64_t kWide = 64;
  const int64_t columns = (queries + W - 1) / W * W;
  finish.begin(columns);
  if (depth <= kWide || queries > 16)
    return gemm<Layout::rows>(keys, columns, depth, rows.data, rows.stride, transposed, Constant<kPitch>{}, finish);
  gemm<Layout::rows>(keys, columns, kPart, rows.data, rows.stride, transposed, Constant<kPitch>{},
                     Store{finish.out, kPitch});
  for (int64_t at = kPart; at < depth; at += kPart)
    gemm<Layout::rows>(keys, columns, depth - at < kPart ? depth - at : kPart, rows.data + at, rows.stride,
                       transposed + at * kPitch, Constant<kPitch>{}, Add{finish.out, kPitch});
  for (int64_t key = 0; key < keys; ++key)
    for (int64_t query = 0; query < columns; query += W) {
      const Vec sum[1] = {load(finish.out + key * kPitch + query)};
      finish(key, query, sum[0]);
      reduce<1, 1>(finish, key, query, sum);
    }
}

// Vectors of queries worked on at a time: as many chains of sums, each of which alone would wait.
template <int64_t kPitch>
constexpr int kAtOnce = kPitch / W % 3 == 0 ? 3 : 2;

// Columns of s.p [key, query], whose maxima are in s.top, become exp2(factor (x - max)); s.total is the columns' sums,
// s.inverse 1 / sums. With a mask they are multiplied by it after the sum.
template <int64_t kPitch, bool kMasked, int N = kAtOnce<kPitch>>
inline void softmax_columns(AttentionScratch<kPitch>& s, int64_t queries, int64_t keys, float factor) {
  for (int64_t query = 0; query < queries; query += N * W) {
    float* const column = s.p + query;
    Vec top[N], sum[N] = {};  // the sum is NaN if any logit is
    for (int v = 0; v < N; ++v) top[v] = load(s.top + query + v * W);
    for (int64_t first = 0; first < keys; first += kPart) {
      Vec part[N] = {};
      const int64_t end = (first + kPart < keys ? first + kPart : keys) * kPitch;
      for (int64_t at = first * kPitch; at < end; at += kPitch)
        for (int v = 0; v < N; ++v) {
          const Vec e = exp2_nonpositive((load(column + at + v * W) - top[v]) * factor);  // exactly 1 at the maximum
          part[v] += e;
          store(column + at + v * W, kMasked ? e * load(s.mask + query + at + v * W) : e);
        }
      for (int v = 0; v < N; ++v) sum[v] += part[v];
    }
    for (int v = 0; v < N; ++v) {
      store(s.total + query + v * W, sum[v]);
      store(s.inverse + query + v * W, 1.0f / sum[v]);
    }
  }
}

// s.p, as softmax_columns leaves it, becomes P * M, and s.dp, the gradient of P, dS; s.dot holds the sums of s.p * s.dp.
// exact: rowsum(P * dP) gains what its rounding left, the rowsum of P * (dP - rowsum), without which a row of dS sums up to
// that rounding instead of 0.
template <int64_t kPitch, bool kDropout, int N = kAtOnce<kPitch>>
void score_gradient(AttentionScratch<kPitch>& s, int64_t queries, int64_t keys, float scale, bool exact) {
  for (int64_t query = 0; query < queries; query += N * W) {
    Vec inverse[N], sum[N], rest[N] = {};
    for (int v = 0; v < N; ++v) {
      inverse[v] = load(s.inverse + query + v * W);
      sum[v] = load(s.dot + query + v * W) / load(s.total + query + v * W);
    }
    if (exact) {
      for (int64_t at = query; at < query + keys * kPitch; at += kPitch)
        for (int v = 0; v < N; ++v) rest[v] += load(s.p + at + v * W) * (load(s.dp + at + v * W) - sum[v]);
      for (int v = 0; v < N; ++v) sum[v] += rest[v] * inverse[v];
    }
    for (int64_t at = query; at < query + keys * kPitch; at += kPitch)
      for (int v = 0; v < N; ++v) {
        const Vec probability = load(s.p + at + v * W) * inverse[v];
        store(s.dp + at + v * W, probability * (load(s.dp + at + v * W) - sum[v]) * scale);
        store(s.p + at + v * W, kDropout ? probability * load(s.mask + at + v * W) : probability);
      }
  }
}

}  // namespace CTR_ISA
}  // namespace ctr
