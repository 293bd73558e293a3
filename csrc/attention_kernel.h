// Attention of one (sample, head) at a time, forward and backward, the F x F maps in L1 only and transposed: queries
// lie along the vectors, so that maxima and sums over the keys are whole-vector operations.
//
// Forward: S = scale Q K^T, P = softmax(S), O = (P * M) V with M the dropout multipliers. Backward, from P
// recomputed: dV = (P * M)^T dO; dP = (dO V^T) * M; dS = scale P * (dP - rowsum(P * dP)); dQ = dS K; dK = dS^T Q.
#pragma once
#include "attention_one_query.h"
#include "attention_scores.h"
#include "philox_vector.h"

namespace ctr {
namespace CTR_ISA {

// More than 64 queries are taken in blocks of that many: the maps of a block with all keys are in the first-level cache,
// or nearly.
constexpr int64_t kForwardBlock = 32, kBackwardBlock = 48;

// Where few columns are summed PyTorch's own sums err little. Heads narrower than this correct the gradient of the scores
// (see score_gradient), and sum dk and dv over blocks of queries; those narrower than kNarrowest over short ones.
constexpr int64_t kNarrow = 16, kNarrowest = 4, kNarrowBlock = 32, kShortBlock = 16;

// Consecutive queries of a head: all of them, or a block of whole vectors.
struct Block {
  int64_t first, count;
};
inline Block block_at(const AttentionArgs& args, int64_t first, int64_t size) {
  const int64_t left = args.queries - first;
  return {first, left < size ? left : size};
}

// s.p, s.total and s.inverse of a block of queries as softmax_columns leaves them; s.mask where dropping.
template <int64_t kPitch, bool kMasked>
inline void probabilities(const AttentionArgs& args, const View& q, const View& k, int64_t width, const Block& block,
                          int64_t sample, int64_t head, AttentionScratch<kPitch>& s, Dropping& dropping) {
  const int64_t queries = block.count, keys = args.keys;
  transpose_block(q.data + block.first * q.stride, q.stride, queries, width, s.transposed, kPitch);
  if (args.scale < 0.0f)  // the maximum is that of the scaled logits
    for (int64_t i = 0; i < width * kPitch; i += W) store(s.transposed + i, -load(s.transposed + i));
  score_products<kPitch>(keys, queries, args.head_dim, k, s.transposed, StoreMax{s.p, kPitch, s.top});
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
  if (queries > W) softmax_columns<kPitch, kMasked>(s, queries, keys, factor);
  else softmax_columns<kPitch, kMasked, 1>(s, queries, keys, factor);
}

template <int64_t kPitch, bool kDropout>
inline void forward_head(const AttentionArgs& args, int64_t sample, int64_t head, const HeadRows& rows,
                         AttentionScratch<kPitch>& s, Dropping& dropping) {
  const int64_t keys = args.keys, width = rows.width();
  const View q = input(args, args.q, sample, head, args.queries, rows.q());
  const View k = input(args, args.k, sample, head, keys, rows.k());
  const View v = input(args, args.v, sample, head, keys, rows.v());
  const View out = output(args, args.out, sample, head, rows.out());
  const bool around = whole_lines(args);
  const int64_t blocks = (args.queries + kPitch - 1) / kPitch;
  for (int64_t first = 0; first < args.queries; first += kPitch) {
    const Block block = block_at(args, first, kPitch);
    const NextSample next{args, sample, head * blocks + first / kPitch, args.heads * blocks};
    next.fetch(args.q, args.queries);
    probabilities<kPitch, kDropout>(args, q, k, width, block, sample, head, s, dropping);
    next.fetch(args.k, keys);
    next.fetch_output(args.out, args.queries);
    gemm<Layout::transposed>(block.count, width, keys, s.p, Constant<kPitch>{}, v.data, v.stride,
                             StoreRowScaled{out.data + first * out.stride, out.stride, s.inverse, around});
    next.fetch(args.v, keys);
  }
  flush(args, args.out, sample, head, args.queries, out, rows.gathered(0));
}

// dS and P * M of a block of queries, in s.dp and s.p.
template <int64_t kPitch, bool kDropout>
inline void differentiate_block(const AttentionArgs& args, const View& q, const View& k, const View& v, const View& go,
                                int64_t width, const Block& block, int64_t sample, int64_t head,
                                AttentionScratch<kPitch>& s, Dropping& dropping, const NextSample& next) {
  next.fetch(args.q, args.queries);
  probabilities<kPitch, false>(args, q, k, width, block, sample, head, s, dropping);
  next.fetch(args.grad_out, args.queries);
  transpose_block(go.data + block.first * go.stride, go.stride, block.count, width, s.transposed, kPitch);
  score_products<kPitch>(args.keys, block.count, args.head_dim, v, s.transposed,
                         StoreDot<kDropout>{s.dp, kPitch, s.p, s.mask, s.dot});
  const bool exact = args.head_dim < kNarrow;
  if (block.count > W) score_gradient<kPitch, kDropout>(s, block.count, args.keys, args.scale, exact);
  else score_gradient<kPitch, kDropout, 1>(s, block.count, args.keys, args.scale, exact);
}

// kBlocks: dk and dv are sums over blocks of queries.
template <int64_t kPitch, bool kDropout, bool kBlocks>
inline void backward_head(const AttentionArgs& args, int64_t sample, int64_t head, const HeadRows& rows,
                          AttentionScratch<kPitch>& s, Dropping& dropping) {
  using Pitch = Constant<kPitch>;
  const int64_t keys = args.keys, width = rows.width();
  const View q = input(args, args.q, sample, head, args.queries, rows.q());
  const View k = input(args, args.k, sample, head, keys, rows.k());
  const View v = input(args, args.v, sample, head, keys, rows.v());
  const View go = input(args, args.grad_out, sample, head, args.queries, rows.go());
  const View dq = output(args, args.dq, sample, head, rows.out());
  const View dk = kBlocks ? View{rows.dk(), width} : output(args, args.dk, sample, head, rows.dk());
  const View dv = kBlocks ? View{rows.dv(), width} : output(args, args.dv, sample, head, rows.dv());
  const int64_t size = kBlocks && args.head_dim < kNarrowest ? kShortBlock : kPitch;
  const int64_t blocks = (args.queries + size - 1) / size;
  const bool around = whole_lines(args);
  for (int64_t first = 0; first < args.queries; first += size) {
    const Block block = block_at(args, first, size);
    const NextSample next{args, sample, head * blocks + first / size, args.heads * blocks};
    differentiate_block<kPitch, kDropout>(args, q, k, v, go, width, block, sample, head, s, dropping, next);
    next.fetch_output(args.dq, args.queries);
    gemm<Layout::transposed>(block.count, width, keys, s.dp, Pitch{}, k.data, k.stride,
                             Store{dq.data + first * dq.stride, dq.stride, around});
    const float *const queries = q.data + first * q.stride, *const grads = go.data + first * go.stride;
    const bool add = kBlocks && first > 0, past = around && !kBlocks;
    next.fetch(args.k, keys);
    next.fetch_output(args.dk, keys);
    if (add) gemm<Layout::rows>(keys, width, block.count, s.dp, Pitch{}, queries, q.stride, Add{dk.data, dk.stride});
    else gemm<Layout::rows>(keys, width, block.count, s.dp, Pitch{}, queries, q.stride, Store{dk.data, dk.stride, past});
    next.fetch(args.v, keys);
    next.fetch_output(args.dv, keys);
    if (add) gemm<Layout::rows>(keys, width, block.count, s.p, Pitch{}, grads, go.stride, Add{dv.data, dv.stride});
    else gemm<Layout::rows>(keys, width, block.count, s.p, Pitch{}, grads, go.stride, Store{dv.data, dv.stride, past});
  }
  flush(args, args.dq, sample, head, args.queries, dq, rows.gathered(0));
  flush(args, args.dk, sample, head, keys, dk, rows.gathered(1));
  flush(args, args.dv, sample, head, keys, dv, rows.gathered(2));
}

template <int64_t kPitch, bool kDropout>
void forward_samples(const AttentionArgs& args, int64_t first, int64_t last) {
  AttentionScratch<kPitch> scratch;
  const HeadRows rows(args);
  Dropping dropping(args.dropout);
  for (int64_t sample = first; sample < last; ++sample)
    for (int64_t head = 0; head < args.heads; ++head)
      forward_head<kPitch, kDropout>(args, sample, head, rows, scratch, dropping);
  finish_streams();
}

template <int64_t kPitch, bool kDropout, bool kBlocks = false>
void backward_samples(const AttentionArgs& args, int64_t first, int64_t last) {
  AttentionScratch<kPitch> scratch;
  const HeadRows rows(args, kBlocks);
  Dropping dropping(args.dropout);
  for (int64_t sample = first; sample < last; ++sample)
    for (int64_t head = 0; head < args.heads; ++head)
      backward_head<kPitch, kDropout, kBlocks>(args, sample, head, rows, scratch, dropping);
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
