// Attention of one (sample, head) at a time, forward and backward, the F x F maps in L1 only and transposed: queries lie
// along the vectors, so that maxima and sums over the keys are whole-vector operations.
//
// Forward: S = scale Q K^T, P = softmax(S), O = (P * M) V with M the dropout multipliers. Backward, from P
// recomputed: dV = (P * M)^T dO; dP = (dO V^T) * M; dS = scale P * (dP - rowsum(P * dP)); dQ = dS K; dK = dS^T Q.
#pragma once
#include "attention_heads.h"
#include "attention_one_query.h"
#include "gemm.h"
#include "philox_vector.h"

namespace ctr {
namespace CTR_ISA {

// Maps [key, query] and transposed inputs have the smallest pitch that holds a block of queries: rows that leave a gap would
// use a part of the first-level cache's sets only. The space between two maps keeps what is read and written at one place
// of both from looking like the same address, of which the processor compares the lowest 12 bits first.
template <int64_t kPitch>
struct alignas(64) AttentionScratch {
  static constexpr int64_t kMap = kMaxKeys * kPitch, kSpace = 80;
  float transposed[kMaxHead * kPitch], space0[kSpace], p[kMap], space1[kSpace], dp[kMap], space2[kSpace], mask[kMap];
  float inverse[kPitch];
};

// More than 64 queries are taken in blocks of that many: the maps of a block with all keys are in the first-level cache, or
// nearly.
constexpr int64_t kForwardBlock = 32, kBackwardBlock = 48;

// Whether the gradient of the scores is corrected (see score_gradient): where few columns or many keys are summed, PyTorch's
// own sums err less. It takes a twentieth of a backward pass.
inline bool exact_gradient(const AttentionArgs& args) { return args.head_dim % 16 != 0 || args.keys > 64; }

// Heads narrower than this sum dk and dv over blocks of queries; those narrower than kNarrowest over short ones.
constexpr int64_t kNarrow = 16, kNarrowest = 4, kNarrowBlock = 32, kShortBlock = 16;

// Consecutive queries of a head: all of them, or a block of whole vectors.
struct Block {
  int64_t first, count;
};
inline Block block_at(const AttentionArgs& args, int64_t first, int64_t size) {
  const int64_t left = args.queries - first;
  return {first, left < size ? left : size};
}

// Vectors of queries worked on at a time: as many chains of maxima and sums, each of which alone would wait.
template <int64_t kPitch>
constexpr int kAtOnce = kPitch / W % 3 == 0 ? 3 : 2;

// Columns of p [key, query] become exp2(factor (x - max)); inverse[query] = 1 / the column's sum. With a mask they are
// multiplied by it after the sum.
template <int64_t kPitch, bool kMasked, int N = kAtOnce<kPitch>>
inline void softmax_columns(float* p, const float* mask, int64_t queries, int64_t keys, float factor, float* inverse) {
  for (int64_t query = 0; query < queries; query += N * W) {
    float* const column = p + query;
    Vec top[N], sum[N] = {};  // the sum is NaN if any logit is
    for (int v = 0; v < N; ++v) top[v] = load(column + v * W);
    for (int64_t at = kPitch; at < keys * kPitch; at += kPitch)
      for (int v = 0; v < N; ++v) top[v] = vmax(top[v], load(column + at + v * W));
    for (int64_t at = 0; at < keys * kPitch; at += kPitch)
      for (int v = 0; v < N; ++v) {
        const Vec e = exp2_nonpositive((load(column + at + v * W) - top[v]) * factor);  // exactly 1 at the maximum
        sum[v] += e;
        store(column + at + v * W, kMasked ? e * load(mask + query + at + v * W) : e);
      }
    for (int v = 0; v < N; ++v) store(inverse + query + v * W, 1.0f / sum[v]);
  }
}

// p, as softmax_columns leaves it, becomes P * M, and dp dS. kExact: rowsum(P * dP) gains what its rounding left, the rowsum of
// P * (dP - rowsum), without which a row of dS sums up to the rounding of 1 / total instead of 0.
template <int64_t kPitch, bool kDropout, bool kExact, int N = kAtOnce<kPitch>>
void score_gradient(float* p, float* dp, const float* mask, int64_t queries, int64_t keys, float scale,
                    const float* inverse) {
  for (int64_t query = 0; query < queries; query += N * W) {
    Vec sum[N] = {};
    for (int64_t at = query; at < query + keys * kPitch; at += kPitch)
      for (int v = 0; v < N; ++v) {
        const Vec probability = load(p + at + v * W) * load(inverse + query + v * W);
        Vec gradient = load(dp + at + v * W);
        if (kDropout) {
          gradient *= load(mask + at + v * W);
          store(dp + at + v * W, gradient);
        }
        sum[v] += probability * gradient;
        store(p + at + v * W, probability);
      }
    if constexpr (kExact) {
      Vec rest[N] = {};
      for (int64_t at = query; at < query + keys * kPitch; at += kPitch)
        for (int v = 0; v < N; ++v) rest[v] += load(p + at + v * W) * (load(dp + at + v * W) - sum[v]);
      for (int v = 0; v < N; ++v) sum[v] += rest[v];
    }
    for (int64_t at = query; at < query + keys * kPitch; at += kPitch)
      for (int v = 0; v < N; ++v) {
        const Vec probability = load(p + at + v * W);
        store(dp + at + v * W, probability * (load(dp + at + v * W) - sum[v]) * scale);
        if (kDropout) store(p + at + v * W, probability * load(mask + at + v * W));
      }
  }
}

// s.p and s.inverse of a block of queries as softmax_columns leaves them; s.mask where dropping.
// map [key, query] = rows [key, depth] times transposed [depth, query]. Of a few queries, sums over wide heads are taken in
// parts: matrix libraries add them up in vectors there, and one long chain would err several times as much.
template <int64_t kPitch>
inline void score_products(int64_t keys, int64_t queries, int64_t depth, const View& rows, const float* transposed,
                           float* map) {
  constexpr int64_t kPart = 16, kWide = 64;
  const int64_t columns = (queries + W - 1) / W * W;
  const int64_t first = depth <= kWide || queries > 16 ? depth : kPart;
  gemm<Layout::rows>(keys, columns, first, rows.data, rows.stride, transposed, Constant<kPitch>{}, Store{map, kPitch});
  for (int64_t at = first; at < depth; at += kPart)
    gemm<Layout::rows>(keys, columns, depth - at < kPart ? depth - at : kPart, rows.data + at, rows.stride,
                       transposed + at * kPitch, Constant<kPitch>{}, Add{map, kPitch});
}

template <int64_t kPitch, bool kMasked>
inline void probabilities(const AttentionArgs& args, const View& q, const View& k, int64_t width, const Block& block,
                          int64_t sample, int64_t head, AttentionScratch<kPitch>& s, Dropping& dropping) {
  const int64_t queries = block.count, keys = args.keys;
  transpose_block(q.data + block.first * q.stride, q.stride, queries, width, s.transposed, kPitch);
  if (args.scale < 0.0f)  // the maximum is that of the scaled logits
    for (int64_t i = 0; i < width * kPitch; i += W) store(s.transposed + i, -load(s.transposed + i));
  score_products<kPitch>(keys, queries, args.head_dim, k, s.transposed, s.p);
  if (args.dropout.threshold != 0) {
    const int64_t groups = (keys + 31) / 32;
    const int64_t row = ((args.first_sample + sample) * args.heads + head) * args.queries + block.first;
    const int64_t first = row * groups;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t query = 0; query < queries; query += W)
        dropout_columns(dropping, first + query * groups + group, groups, queries - query < W ? queries - query : W,
                        keys - 32 * group < 32 ? keys - 32 * group : 32, s.mask + 32 * group * kPitch + query,
                        kPitch);
  }
  const float factor = (args.scale < 0.0f ? -args.scale : args.scale) * kLog2e;
  if (queries > W) softmax_columns<kPitch, kMasked>(s.p, s.mask, queries, keys, factor, s.inverse);
  else softmax_columns<kPitch, kMasked, 1>(s.p, s.mask, queries, keys, factor, s.inverse);
}

template <int64_t kPitch, bool kDropout>
inline void forward_head(const AttentionArgs& args, int64_t sample, int64_t head, const HeadRows& rows,
                         AttentionScratch<kPitch>& s, Dropping& dropping) {
  const int64_t keys = args.keys, width = rows.width();
  const View q = input(args, args.q, sample, head, args.queries, rows.q());
  const View k = input(args, args.k, sample, head, keys, rows.k()), v = input(args, args.v, sample, head, keys, rows.v());
  const View out = output(args, args.out, sample, head, rows.out());
  const bool around = args.around && !gathers(args);
  for (int64_t first = 0; first < args.queries; first += kPitch) {
    const Block block = block_at(args, first, kPitch);
    probabilities<kPitch, kDropout>(args, q, k, width, block, sample, head, s, dropping);
    gemm<Layout::transposed>(block.count, width, keys, s.p, Constant<kPitch>{}, v.data, v.stride,
                             StoreRowScaled{out.data + first * out.stride, out.stride, s.inverse, around});
  }
  flush(args, args.out, sample, head, args.queries, out, rows.sample_rows(0));
}

// dS and P * M of a block of queries, in s.dp and s.p.
template <int64_t kPitch, bool kDropout>
inline void differentiate_block(const AttentionArgs& args, const View& q, const View& k, const View& v, const View& go,
                                int64_t width, const Block& block, int64_t sample, int64_t head,
                                AttentionScratch<kPitch>& s, Dropping& dropping) {
  probabilities<kPitch, false>(args, q, k, width, block, sample, head, s, dropping);
  transpose_block(go.data + block.first * go.stride, go.stride, block.count, width, s.transposed, kPitch);
  score_products<kPitch>(args.keys, block.count, args.head_dim, v, s.transposed, s.dp);
  const bool exact = exact_gradient(args);
  const auto gradient = block.count > W ? (exact ? score_gradient<kPitch, kDropout, true>
                                                 : score_gradient<kPitch, kDropout, false>)
                                        : (exact ? score_gradient<kPitch, kDropout, true, 1>
                                                 : score_gradient<kPitch, kDropout, false, 1>);
  gradient(s.p, s.dp, s.mask, block.count, args.keys, args.scale, s.inverse);
}

// kBlocks: dk and dv are sums over blocks of queries.
template <int64_t kPitch, bool kDropout, bool kBlocks>
inline void backward_head(const AttentionArgs& args, int64_t sample, int64_t head, const HeadRows& rows,
                          AttentionScratch<kPitch>& s, Dropping& dropping) {
  using Pitch = Constant<kPitch>;
  const int64_t keys = args.keys, width = rows.width();
  const View q = input(args, args.q, sample, head, args.queries, rows.q());
  const View k = input(args, args.k, sample, head, keys, rows.k()), v = input(args, args.v, sample, head, keys, rows.v());
  const View go = input(args, args.grad_out, sample, head, args.queries, rows.go());
  const View dq = output(args, args.dq, sample, head, rows.out());
  const View dk = kBlocks ? View{rows.dk(), width} : output(args, args.dk, sample, head, rows.dk());
  const View dv = kBlocks ? View{rows.dv(), width} : output(args, args.dv, sample, head, rows.dv());
  const int64_t size = kBlocks && args.head_dim < kNarrowest ? kShortBlock : kPitch;
  const bool around = args.around && !gathers(args);
  for (int64_t first = 0; first < args.queries; first += size) {
    const Block block = block_at(args, first, size);
    differentiate_block<kPitch, kDropout>(args, q, k, v, go, width, block, sample, head, s, dropping);
    gemm<Layout::transposed>(block.count, width, keys, s.dp, Pitch{}, k.data, k.stride,
                             Store{dq.data + first * dq.stride, dq.stride, around});
    const float *const queries = q.data + first * q.stride, *const grads = go.data + first * go.stride;
    if (kBlocks && first > 0) {
      gemm<Layout::rows>(keys, width, block.count, s.dp, Pitch{}, queries, q.stride, Add{dk.data, dk.stride});
      gemm<Layout::rows>(keys, width, block.count, s.p, Pitch{}, grads, go.stride, Add{dv.data, dv.stride});
    } else {
      const bool past = around && !kBlocks;
      gemm<Layout::rows>(keys, width, block.count, s.dp, Pitch{}, queries, q.stride, Store{dk.data, dk.stride, past});
      gemm<Layout::rows>(keys, width, block.count, s.p, Pitch{}, grads, go.stride, Store{dv.data, dv.stride, past});
    }
  }
  flush(args, args.dq, sample, head, args.queries, dq, rows.sample_rows(0));
  flush(args, args.dk, sample, head, keys, dk, rows.sample_rows(1));
  flush(args, args.dv, sample, head, keys, dv, rows.sample_rows(2));
}

template <int64_t kPitch, bool kDropout>
void forward_samples(const AttentionArgs& args, int64_t first, int64_t last) {
  AttentionScratch<kPitch> scratch;
  const HeadRows rows(args);
  Dropping dropping(args.dropout);
  for (int64_t sample = first; sample < last; ++sample)
    for (int64_t head = 0; head < args.heads; ++head) {
      prefetch_next(args, args.keys, {&args.k, &args.v}, sample, head);
      prefetch_next(args, args.queries, {&args.q}, sample, head);
      if (!args.around) prefetch_next(args, args.queries, {&args.out}, sample, head);
      forward_head<kPitch, kDropout>(args, sample, head, rows, scratch, dropping);
    }
  finish_streams();
}

template <int64_t kPitch, bool kDropout, bool kBlocks = false>
void backward_samples(const AttentionArgs& args, int64_t first, int64_t last) {
  AttentionScratch<kPitch> scratch;
  const HeadRows rows(args, kBlocks);
  Dropping dropping(args.dropout);
  for (int64_t sample = first; sample < last; ++sample)
    for (int64_t head = 0; head < args.heads; ++head) {
      prefetch_next(args, args.keys, {&args.k, &args.v}, sample, head);
      prefetch_next(args, args.queries, {&args.q, &args.grad_out}, sample, head);
      if (!args.around) {
        prefetch_next(args, args.queries, {&args.dq}, sample, head);
        prefetch_next(args, args.keys, {&args.dk, &args.dv}, sample, head);
      }
      backward_head<kPitch, kDropout, kBlocks>(args, sample, head, rows, scratch, dropping);
    }
  finish_streams();
}

template <bool kDropout>
void forward_of(const AttentionArgs& args, int64_t first, int64_t last) {
  if (args.queries == 1) return query_forward_samples<kDropout>(args, first, last);
  if (args.queries <= 32) return forward_samples<32, kDropout>(args, first, last);
  if (args.queries <= 48) return forward_samples<48, kDropout>(args, first, last);
  if (args.queries <= 64) return forward_samples<64, kDropout>(args, first, last);
  return forward_samples<kForwardBlock, kDropout>(args, first, last);
}

template <bool kDropout>
void backward_of(const AttentionArgs& args, int64_t first, int64_t last) {
  if (args.queries == 1) return query_backward_samples<kDropout>(args, first, last);
  if (args.head_dim < kNarrow && args.queries > kShortBlock)
    return backward_samples<kNarrowBlock, kDropout, true>(args, first, last);
  if (args.queries <= 32) return backward_samples<32, kDropout>(args, first, last);
  if (args.queries <= 48) return backward_samples<48, kDropout>(args, first, last);
  if (args.queries <= 64) return backward_samples<64, kDropout>(args, first, last);
  return backward_samples<kBackwardBlock, kDropout, true>(args, first, last);
}

inline void attention_forward(const AttentionArgs& args, int64_t first, int64_t last) {
  if (args.dropout.threshold != 0) return forward_of<true>(args, first, last);
  return forward_of<false>(args, first, last);
}

inline void attention_backward(const AttentionArgs& args, int64_t first, int64_t last) {
  if (args.dropout.threshold != 0) return backward_of<true>(args, first, last);
  return backward_of<false>(args, first, last);
}

}  // namespace CTR_ISA
}  // namespace ctr
