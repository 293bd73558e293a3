// Attention of one query a head, forward and backward: logits and weights of the head are one row, and the products with
// keys and values pass over memory once. Formulas as in attention_kernel.h.
#pragma once
#include "attention_heads.h"
#include "philox_vector.h"
#include "simd.h"

namespace ctr {
namespace CTR_ISA {

// out[r] = a . rows[r] over `width` floats, r < keys; zero up to a multiple of W.
inline void row_products(const float* a, const View& rows, int64_t keys, int64_t width, float* out) {
  for (int64_t r = 0; r < keys; r += W) {
    Vec sums[W];
    for (int i = 0; i < W; ++i) {
      sums[i] = Vec{};
      if (r + i >= keys) continue;
      const float* row = rows.data + (r + i) * rows.stride;
      for (int64_t c = 0; c < width; c += W) sums[i] += load(a + c) * load(row + c);
    }
    store(out + r, sum_rows(sums));
  }
}

// out = factor * sum over r of weights[r] * rows[r].
inline void weighted_sum(const float* weights, float factor, const View& rows, int64_t keys, int64_t width, float* out) {
  for (int64_t c = 0; c < width; c += W) {
    Vec even = {}, odd = {};  // two chains
    const float* row = rows.data + c;
    int64_t r = 0;
    for (; r + 2 <= keys; r += 2, row += 2 * rows.stride) {
      even += load(row) * weights[r];
      odd += load(row + rows.stride) * weights[r + 1];
    }
    if (r < keys) even += load(row) * weights[r];
    store(out + c, (even + odd) * factor);
  }
}

// rows[r] = weights[r] * a.
inline void outer_product(const float* weights, const float* a, int64_t keys, int64_t width, const View& rows,
                          bool around) {
  for (int64_t r = 0; r < keys; ++r)
    for (int64_t c = 0; c < width; c += W) put(rows.data + r * rows.stride + c, load(a + c) * weights[r], around);
}

struct alignas(64) QueryScratch {
  float p[kMaxKeys], dp[kMaxKeys], mask[kMaxKeys];
};

// s.p [keys] = exp2(|scale| log2(e) (sign(scale) logits - max)), zero up to a multiple of W; returns 1 / their sum. s.mask
// where dropping.
template <bool kDropout>
inline float query_weights(const AttentionArgs& args, const View& q, const View& k, int64_t sample, int64_t head,
                           int64_t width, QueryScratch& s, Dropping& dropping) {
  const int64_t keys = args.keys;
  const float sign = args.scale < 0.0f ? -1.0f : 1.0f, factor = sign * args.scale * kLog2e;
  row_products(q.data, k, keys, width, s.p);
  const float first_logit = s.p[0] * sign;
  const auto logits = [&](int64_t key) __attribute__((always_inline)) {  // behind the last the first is repeated
    return lane_index() < static_cast<int32_t>(keys - key) ? load(s.p + key) * sign : splat(first_logit);
  };
  Vec top = logits(0), sum = {};
  for (int64_t key = W; key < keys; key += W) top = vmax(top, logits(key));
  top = max_lanes(top);
  for (int64_t key = 0; key < keys; key += W) {
    const Vec e = exp2_nonpositive((logits(key) - top) * factor);
    const Vec weights = lane_index() < static_cast<int32_t>(keys - key) ? e : Vec{};
    sum += weights;
    store(s.p + key, weights);
  }
  if (kDropout) {
    const int64_t groups = (keys + 31) / 32, first = ((args.first_sample + sample) * args.heads + head) * groups;
    for (int64_t group = 0; group < groups; ++group) {
      dropping.take_high((first + group) * 8);
      Vec multipliers[kGroupVectors];
      group_multipliers<1>(dropping, first + group, multipliers);
      for (int i = 0; i < kGroupVectors; ++i) store(s.mask + group * 32 + i * W, multipliers[i]);
    }
  }
  return 1.0f / sum_lanes(sum)[0];
}

template <bool kDropout>
inline void query_forward(const AttentionArgs& args, int64_t sample, int64_t head, const HeadRows& rows,
                          QueryScratch& s, Dropping& dropping) {
  const int64_t keys = args.keys, width = rows.width();
  const View q = padded_input(args, args.q, sample, head, 1, rows.q());
  const View k = padded_input(args, args.k, sample, head, keys, rows.k());
  const View v = padded_input(args, args.v, sample, head, keys, rows.v());
  const View out = output(args, args.out, sample, head, rows.out());
  const float inverse = query_weights<kDropout>(args, q, k, sample, head, width, s, dropping);
  if (kDropout)
    for (int64_t key = 0; key < keys; key += W) store(s.p + key, load(s.p + key) * load(s.mask + key));
  weighted_sum(s.p, inverse, v, keys, width, out.data);
  flush(args, args.out, sample, head, 1, out, rows.gathered(0));
}

template <bool kDropout>
inline void query_backward(const AttentionArgs& args, int64_t sample, int64_t head, const HeadRows& rows,
                           QueryScratch& s, Dropping& dropping) {
  const int64_t keys = args.keys, width = rows.width();
  const View q = padded_input(args, args.q, sample, head, 1, rows.q());
  const View k = padded_input(args, args.k, sample, head, keys, rows.k());
  const View v = padded_input(args, args.v, sample, head, keys, rows.v());
  const View go = padded_input(args, args.grad_out, sample, head, 1, rows.go());
  const View dq = output(args, args.dq, sample, head, rows.out()), dk = output(args, args.dk, sample, head, rows.dk());
  const View dv = output(args, args.dv, sample, head, rows.dv());
  const float inverse = query_weights<kDropout>(args, q, k, sample, head, width, s, dropping);
  row_products(go.data, v, keys, width, s.dp);
  Vec sum = {};
  for (int64_t key = 0; key < keys; key += W) {
    const Vec probability = load(s.p + key) * inverse;
    const Vec gradient = kDropout ? load(s.dp + key) * load(s.mask + key) : load(s.dp + key);
    sum += probability * gradient;
    store(s.dp + key, gradient);
    store(s.p + key, probability);
  }
  sum = sum_lanes(sum);
  Vec rest = {};  // what rounding left of the sum: see score_gradient
  for (int64_t key = 0; key < keys; key += W) rest += load(s.p + key) * (load(s.dp + key) - sum);
  sum += sum_lanes(rest);
  for (int64_t key = 0; key < keys; key += W) {
    const Vec probability = load(s.p + key);
    store(s.dp + key, probability * (load(s.dp + key) - sum) * args.scale);
    if (kDropout) store(s.p + key, probability * load(s.mask + key));
  }
  weighted_sum(s.dp, 1.0f, k, keys, width, dq.data);
  const bool around = whole_lines(args);
  outer_product(s.dp, q.data, keys, width, dk, around);
  outer_product(s.p, go.data, keys, width, dv, around);
  flush(args, args.dq, sample, head, 1, dq, rows.gathered(0));
  flush(args, args.dk, sample, head, keys, dk, rows.gathered(1));
  flush(args, args.dv, sample, head, keys, dv, rows.gathered(2));
}

template <bool kDropout>
void query_forward_samples(const AttentionArgs& args, int64_t first, int64_t last) {
  QueryScratch scratch;
  const HeadRows rows(args);
  Dropping dropping(args.dropout);
  for (int64_t sample = first; sample < last; ++sample)
    for (int64_t head = 0; head < args.heads; ++head) {
      const NextSample next{args, sample, head, args.heads};
      next.fetch(args.k, args.keys);
      next.fetch(args.v, args.keys);
      query_forward<kDropout>(args, sample, head, rows, scratch, dropping);
    }
  finish_streams();
}

template <bool kDropout>
void query_backward_samples(const AttentionArgs& args, int64_t first, int64_t last) {
  QueryScratch scratch;
  const HeadRows rows(args);
  Dropping dropping(args.dropout);
  for (int64_t sample = first; sample < last; ++sample)
    for (int64_t head = 0; head < args.heads; ++head) {
      const NextSample next{args, sample, head, args.heads};
      next.fetch(args.k, args.keys);
      next.fetch(args.v, args.keys);
      query_backward<kDropout>(args, sample, head, rows, scratch, dropping);
    }
  finish_streams();
}

}  // namespace CTR_ISA
}  // namespace ctr
