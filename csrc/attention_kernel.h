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

// Maps [key, query] and transposed inputs have the smallest pitch that holds the fields: rows that leave a gap would use a
// part of the first-level cache's sets only. The space between two maps keeps what is read and written at one place
// of both from looking like the same address, of which the processor compares the lowest 12 bits first.
template <int64_t kPitch>
struct alignas(64) AttentionScratch {
  static constexpr int64_t kMap = kPitch * kPitch, kSpace = 80;
  float transposed[kMax * kPitch], space0[kSpace], p[kMap], space1[kSpace], dp[kMap], space2[kSpace], mask[kMap];
  float inverse[kPitch];
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
                                                         int64_t sample, int64_t head) {
  if (sample + 1 >= args.samples) return;
  const int64_t size = element_size(args.type), width = args.heads * args.head_dim * size;
  for (int64_t r = args.fields * head / args.heads; r < args.fields * (head + 1) / args.heads; ++r)
    for (const Strided* t : tensors)
      prefetch(static_cast<const char*>(t->data) + ((sample + 1) * t->batch + r * t->field) * size, width);
}

// Vectors of queries worked on at a time: as many chains of maxima and sums, each of which alone would wait.
template <int64_t kPitch>
constexpr int kAtOnce = kPitch / W % 3 == 0 ? 3 : kPitch / W % 2 == 0 ? 2 : 1;

// Columns of p [key, query] become exp2(factor (x - max)); inverse[query] = 1 / the column's sum. With a mask they are
// multiplied by it after the sum.
template <int64_t kPitch, bool kMasked>
inline void softmax_columns(float* p, const float* mask, int64_t fields, float factor, float* inverse) {
  constexpr int N = kAtOnce<kPitch>;
  for (int64_t query = 0; query < fields; query += N * W) {
    float* const column = p + query;
    Vec top[N], sum[N] = {};  // the sum is NaN if any logit is
    for (int v = 0; v < N; ++v) top[v] = load(column + v * W);
    for (int64_t at = kPitch; at < fields * kPitch; at += kPitch)
      for (int v = 0; v < N; ++v) top[v] = vmax(top[v], load(column + at + v * W));
    for (int64_t at = 0; at < fields * kPitch; at += kPitch)
      for (int v = 0; v < N; ++v) {
        const Vec e = exp2_nonpositive((load(column + at + v * W) - top[v]) * factor);  // exactly 1 at the maximum
        sum[v] += e;
        store(column + at + v * W, kMasked ? e * load(mask + query + at + v * W) : e);
      }
    for (int v = 0; v < N; ++v) store(inverse + query + v * W, 1.0f / sum[v]);
  }
}

// p, as softmax_columns leaves it, becomes P * M, and dp dS.
template <int64_t kPitch, bool kDropout>
void score_gradient(float* p, float* dp, const float* mask, int64_t fields, float scale, const float* inverse) {
  constexpr int N = kAtOnce<kPitch>;
  for (int64_t query = 0; query < fields; query += N * W) {
    Vec sum[N] = {};
    for (int64_t at = query; at < query + fields * kPitch; at += kPitch)
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
    for (int64_t at = query; at < query + fields * kPitch; at += kPitch)
      for (int v = 0; v < N; ++v) {
        const Vec probability = load(p + at + v * W);
        store(dp + at + v * W, probability * (load(dp + at + v * W) - sum[v]) * scale);
        if (kDropout) store(p + at + v * W, probability * load(mask + at + v * W));
      }
  }
}

// s.p and s.inverse as softmax_columns leaves them; s.mask where dropping.
template <int64_t kPitch, bool kMasked>
inline void probabilities(const AttentionArgs& args, const View& q, const View& k, int64_t sample, int64_t head,
                          AttentionScratch<kPitch>& s, Dropping& dropping) {
  const int64_t fields = args.fields, width = args.head_dim;
  transpose_block(q.data, q.stride, fields, width, s.transposed, kPitch);
  if (args.scale < 0.0f)  // the maximum is that of the scaled logits
    for (int64_t i = 0; i < width * kPitch; i += W) store(s.transposed + i, -load(s.transposed + i));
  gemm<Layout::rows>(fields, (fields + W - 1) / W * W, width, k.data, k.stride, s.transposed, Constant<kPitch>{},
                     Store{s.p, kPitch});
  if (args.dropout.threshold != 0) {
    const int64_t groups = (fields + 31) / 32, row = ((args.first_sample + sample) * args.heads + head) * fields;
    const int64_t first = row * groups;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t query = 0; query < fields; query += W)
        dropout_columns(dropping, first + query * groups + group, groups, fields - query < W ? fields - query : W,
                        fields - 32 * group < 32 ? fields - 32 * group : 32, s.mask + 32 * group * kPitch + query,
                        kPitch);
  }
  softmax_columns<kPitch, kMasked>(s.p, s.mask, fields, (args.scale < 0.0f ? -args.scale : args.scale) * kLog2e,
                                   s.inverse);
}

template <int64_t kPitch, bool kDropout>
inline void forward_head(const AttentionArgs& args, int64_t sample, int64_t head, AttentionScratch<kPitch>& s,
                         Dropping& dropping) {
  const int64_t fields = args.fields;
  const View q = input(args, args.q, sample, head, s.q), k = input(args, args.k, sample, head, s.k);
  const View v = input(args, args.v, sample, head, s.v), out = output(args, args.out, sample, head, s.out);
  probabilities<kPitch, kDropout>(args, q, k, sample, head, s, dropping);
  gemm<Layout::transposed>(fields, args.head_dim, fields, s.p, Constant<kPitch>{}, v.data, v.stride,
                           StoreRowScaled{out.data, out.stride, s.inverse, args.around});
  flush(args, args.out, sample, head, out);
}

template <int64_t kPitch, bool kDropout>
inline void backward_head(const AttentionArgs& args, int64_t sample, int64_t head, AttentionScratch<kPitch>& s,
                          Dropping& dropping) {
  using Pitch = Constant<kPitch>;
  const int64_t fields = args.fields, width = args.head_dim, queries = (fields + W - 1) / W * W;
  const View q = input(args, args.q, sample, head, s.q), k = input(args, args.k, sample, head, s.k);
  const View v = input(args, args.v, sample, head, s.v), go = input(args, args.grad_out, sample, head, s.go);
  const View dq = output(args, args.dq, sample, head, s.dq), dk = output(args, args.dk, sample, head, s.dk);
  const View dv = output(args, args.dv, sample, head, s.dv);
  probabilities<kPitch, false>(args, q, k, sample, head, s, dropping);
  transpose_block(go.data, go.stride, fields, width, s.transposed, kPitch);
  gemm<Layout::rows>(fields, queries, width, v.data, v.stride, s.transposed, Pitch{}, Store{s.dp, kPitch});
  score_gradient<kPitch, kDropout>(s.p, s.dp, s.mask, fields, args.scale, s.inverse);
  gemm<Layout::transposed>(fields, width, fields, s.dp, Pitch{}, k.data, k.stride,
                           Store{dq.data, dq.stride, args.around});
  gemm<Layout::rows>(fields, width, fields, s.dp, Pitch{}, q.data, q.stride, Store{dk.data, dk.stride, args.around});
  gemm<Layout::rows>(fields, width, fields, s.p, Pitch{}, go.data, go.stride, Store{dv.data, dv.stride, args.around});
  flush(args, args.dq, sample, head, dq);
  flush(args, args.dk, sample, head, dk);
  flush(args, args.dv, sample, head, dv);
}

template <int64_t kPitch, bool kDropout>
void forward_samples(const AttentionArgs& args, int64_t first, int64_t last) {
  AttentionScratch<kPitch> scratch;
  Dropping dropping(args.dropout);
  for (int64_t sample = first; sample < last; ++sample)
    for (int64_t head = 0; head < args.heads; ++head) {
      prefetch_next(args, {&args.q, &args.k, &args.v}, sample, head);
      forward_head<kPitch, kDropout>(args, sample, head, scratch, dropping);
    }
  finish_streams();
}

template <int64_t kPitch, bool kDropout>
void backward_samples(const AttentionArgs& args, int64_t first, int64_t last) {
  AttentionScratch<kPitch> scratch;
  Dropping dropping(args.dropout);
  for (int64_t sample = first; sample < last; ++sample)
    for (int64_t head = 0; head < args.heads; ++head) {
      prefetch_next(args, {&args.q, &args.k, &args.v, &args.grad_out}, sample, head);
      backward_head<kPitch, kDropout>(args, sample, head, scratch, dropping);
    }
  finish_streams();
}

template <bool kDropout>
void forward_of(const AttentionArgs& args, int64_t first, int64_t last) {
  if (args.fields <= 32) return forward_samples<32, kDropout>(args, first, last);
  if (args.fields <= 48) return forward_samples<48, kDropout>(args, first, last);
  return forward_samples<64, kDropout>(args, first, last);
}

template <bool kDropout>
void backward_of(const AttentionArgs& args, int64_t first, int64_t last) {
  if (args.fields <= 32) return backward_samples<32, kDropout>(args, first, last);
  if (args.fields <= 48) return backward_samples<48, kDropout>(args, first, last);
  return backward_samples<64, kDropout>(args, first, last);
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
