// Attention of one (sample, head) at a time, forward and backward, the F x F maps in L1 only and transposed: queries lie
// along the vectors, so that maxima and sums over the keys are whole-vector operations.
//
// Forward: S = scale Q K^T, P = softmax(S), O = (P * M) V with M the dropout multipliers. Backward, from P
// recomputed: dV = (P * M)^T dO; dP = (dO V^T) * M; dS = scale P * (dP - rowsum(P * dP)); dQ = dS K; dK = dS^T Q.
#pragma once
#include <initializer_list>

#include "convert.h"
#include "gemm.h"
#include "philox_vector.h"
#include "prefetch.h"

namespace ctr {
namespace CTR_ISA {

constexpr int64_t kMax = 64;  // fields, and width of a head
constexpr int64_t kHead = kMax * kMax;
using Pitch = Constant<kMax>;  // of the maps [key, query] and of transposed inputs

struct alignas(64) AttentionScratch {
  float transposed[kHead], p[kHead], dp[kHead], mask[kHead];    // p, dp, mask: [key, query]
  float inverse[kMax];
  float q[kHead], k[kHead], v[kHead], go[kHead];                // bf16 inputs as fp32
  float out[kHead], dq[kHead], dk[kHead], dv[kHead];            // bf16 outputs before rounding
};

struct View {
  float* data;
  int64_t stride;  // between fields
};

inline int64_t element_size(Type type) { return type == Type::f32 ? 4 : 2; }

inline char* head_pointer(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head) {
  return static_cast<char*>(t.data) + (sample * t.batch + head * args.head_dim) * element_size(args.type);
}

// fp32 memory is used where it is; bf16 passes through the scratch.
inline View input(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head, float* scratch) {
  char* p = head_pointer(args, t, sample, head);
  if (args.type == Type::f32) return {reinterpret_cast<float*>(p), t.field};
  read_rows(args.type, p, t.field, args.fields, args.head_dim, scratch, args.head_dim);
  return {scratch, args.head_dim};
}
inline View output(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head, float* scratch) {
  if (args.type != Type::f32) return {scratch, args.head_dim};
  return {reinterpret_cast<float*>(head_pointer(args, t, sample, head)), t.field};
}
inline void flush(const AttentionArgs& args, const Strided& t, int64_t sample, int64_t head, const View& view) {
  if (args.type == Type::f32) return;
  write_rows(args.type, view.data, view.stride, args.fields, args.head_dim, head_pointer(args, t, sample, head),
             t.field);
}

// Prefetches a head's share of the next sample, whole rows in the order of memory: a head's own lines, one or two of
// every row, are a pattern that the hardware does not foresee.
__attribute__((always_inline)) inline void prefetch_next(const AttentionArgs& args,
                                                         std::initializer_list<const Strided*> tensors,
                                                         int64_t sample, int64_t last, int64_t head) {
  if (sample + 1 >= last) return;
  const int64_t size = element_size(args.type), width = args.heads * args.head_dim * size;
  for (int64_t r = args.fields * head / args.heads; r < args.fields * (head + 1) / args.heads; ++r)
    for (const Strided* t : tensors)
      prefetch(static_cast<const char*>(t->data) + ((sample + 1) * t->batch + r * t->field) * size, width);
}

// Columns of p [key, query] become exp2(factor (x - max)); inverse[query] = 1 / the column's sum.
inline void softmax_columns(float* p, int64_t fields, float factor, float* inverse) {
  for (int64_t query = 0; query < fields; query += W) {
    float* column = p + query;
    Vec top = load(column);
    for (int64_t key = 1; key < fields; ++key) top = vmax(top, load(column + key * kMax));
    Vec sum = {};  // NaN if any logit is
    for (int64_t key = 0; key < fields; ++key) {
      const Vec e = exp2_nonpositive((load(column + key * kMax) - top) * factor);  // exactly 1 at the maximum
      sum += e;
      store(column + key * kMax, e);
    }
    store(inverse + query, 1.0f / sum);
  }
}

// p, as softmax_columns leaves it, becomes P * M, and dp dS.
template <bool kDropout>
void score_gradient(float* p, float* dp, const float* mask, int64_t fields, float scale, const float* inverse) {
  for (int64_t query = 0; query < fields; query += W) {
    const Vec factor = load(inverse + query);
    Vec sum = {};
    for (int64_t at = query; at < fields * kMax; at += kMax) {
      const Vec probability = load(p + at) * factor;
      Vec gradient = load(dp + at);
      if (kDropout) {
        gradient *= load(mask + at);
        store(dp + at, gradient);
      }
      store(p + at, probability);
      sum += probability * gradient;
    }
    for (int64_t at = query; at < fields * kMax; at += kMax) {
      const Vec probability = load(p + at);
      store(dp + at, probability * (load(dp + at) - sum) * scale);
      if (kDropout) store(p + at, probability * load(mask + at));
    }
  }
}

// s.p and s.inverse as softmax_columns leaves them; s.mask where dropping.
inline void probabilities(const AttentionArgs& args, const View& q, const View& k, int64_t sample, int64_t head,
                          AttentionScratch& s, Dropping& dropping) {
  const int64_t fields = args.fields, queries = (fields + W - 1) / W * W;
  transpose_block(q.data, q.stride, fields, args.head_dim, s.transposed, kMax);
  if (args.scale < 0.0f)  // the maximum is that of the scaled logits
    for (int64_t i = 0; i < args.head_dim * kMax; i += W) store(s.transposed + i, -load(s.transposed + i));
  gemm<Layout::rows>(fields, queries, args.head_dim, k.data, k.stride, s.transposed, Pitch{}, Store{s.p, kMax});
  softmax_columns(s.p, fields, (args.scale < 0.0f ? -args.scale : args.scale) * kLog2e, s.inverse);
  if (args.dropout.threshold == 0) return;
  const int64_t groups = (fields + 31) / 32, first = (sample * args.heads + head) * fields * groups;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t query = 0; query < fields; query += W)
      dropout_columns(dropping, first + query * groups + group, groups, fields - query < W ? fields - query : W,
                      fields - 32 * group < 32 ? fields - 32 * group : 32, s.mask + 32 * group * kMax + query, kMax);
}

inline void forward_head(const AttentionArgs& args, int64_t sample, int64_t head, AttentionScratch& s, Dropping& dropping) {
  const int64_t fields = args.fields;
  const View q = input(args, args.q, sample, head, s.q), k = input(args, args.k, sample, head, s.k);
  const View v = input(args, args.v, sample, head, s.v), out = output(args, args.out, sample, head, s.out);
  probabilities(args, q, k, sample, head, s, dropping);
  if (args.dropout.threshold != 0)
    for (int64_t row = 0; row < fields * kMax; row += kMax)
      for (int64_t at = row; at < row + fields; at += W) store(s.p + at, load(s.p + at) * load(s.mask + at));
  gemm<Layout::transposed>(fields, args.head_dim, fields, s.p, Pitch{}, v.data, v.stride,
                           StoreRowScaled{out.data, out.stride, s.inverse, args.around});
  flush(args, args.out, sample, head, out);
}

inline void backward_head(const AttentionArgs& args, int64_t sample, int64_t head, AttentionScratch& s, Dropping& dropping) {
  const int64_t fields = args.fields, width = args.head_dim, queries = (fields + W - 1) / W * W;
  const View q = input(args, args.q, sample, head, s.q), k = input(args, args.k, sample, head, s.k);
  const View v = input(args, args.v, sample, head, s.v), go = input(args, args.grad_out, sample, head, s.go);
  const View dq = output(args, args.dq, sample, head, s.dq), dk = output(args, args.dk, sample, head, s.dk);
  const View dv = output(args, args.dv, sample, head, s.dv);
  probabilities(args, q, k, sample, head, s, dropping);
  transpose_block(go.data, go.stride, fields, width, s.transposed, kMax);
  gemm<Layout::rows>(fields, queries, width, v.data, v.stride, s.transposed, Pitch{}, Store{s.dp, kMax});
  if (args.dropout.threshold != 0) score_gradient<true>(s.p, s.dp, s.mask, fields, args.scale, s.inverse);
  else score_gradient<false>(s.p, s.dp, nullptr, fields, args.scale, s.inverse);
  gemm<Layout::transposed>(fields, width, fields, s.dp, Pitch{}, k.data, k.stride,
                           Store{dq.data, dq.stride, args.around});
  gemm<Layout::rows>(fields, width, fields, s.dp, Pitch{}, q.data, q.stride, Store{dk.data, dk.stride, args.around});
  gemm<Layout::rows>(fields, width, fields, s.p, Pitch{}, go.data, go.stride, Store{dv.data, dv.stride, args.around});
  flush(args, args.dq, sample, head, dq);
  flush(args, args.dk, sample, head, dk);
  flush(args, args.dv, sample, head, dv);
}

inline void attention_forward(const AttentionArgs& args, int64_t first, int64_t last) {
  AttentionScratch scratch;
  Dropping dropping(args.dropout);
  for (int64_t sample = first; sample < last; ++sample)
    for (int64_t head = 0; head < args.heads; ++head) {
      prefetch_next(args, {&args.q, &args.k, &args.v}, sample, last, head);
      forward_head(args, sample, head, scratch, dropping);
    }
  finish_streams();
}

inline void attention_backward(const AttentionArgs& args, int64_t first, int64_t last) {
  AttentionScratch scratch;
  Dropping dropping(args.dropout);
  for (int64_t sample = first; sample < last; ++sample)
    for (int64_t head = 0; head < args.heads; ++head) {
      prefetch_next(args, {&args.q, &args.k, &args.v, &args.grad_out}, sample, last, head);
      backward_head(args, sample, head, scratch, dropping);
    }
  finish_streams();
}

}  // namespace CTR_ISA
}  // namespace ctr
