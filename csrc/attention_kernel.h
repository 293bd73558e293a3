// Attention of one (sample, head) at a time, forward and backward, the F x F map in L1 only.
//
// Forward: S = scale Q K^T, P = softmax(S), O = (P * M) V with M the dropout multipliers. Backward, from P
// recomputed: dV = (P * M)^T dO; dP = (dO V^T) * M; dS = scale P * (dP - rowsum(P * dP)); dQ = dS K; dK = dS^T Q.
#pragma once
#include <initializer_list>

#include "convert.h"
#include "gemm.h"
#include "philox_vector.h"

namespace ctr {
namespace CTR_ISA {

constexpr int64_t kMax = 64;  // fields, and width of a head
constexpr int64_t kHead = kMax * kMax;

struct alignas(64) AttentionScratch {
  float transposed[kHead], p[kHead], dp[kHead], mask[kHead];
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
// every row, are a pattern that the hardware does not foresee. Always inlined: GCC takes a function that only
// prefetches for one without effect, and drops the call.
__attribute__((always_inline)) inline void prefetch_next(const AttentionArgs& args,
                                                         std::initializer_list<const Strided*> tensors,
                                                         int64_t sample, int64_t last, int64_t head) {
  if (sample + 1 >= last) return;
  const int64_t size = element_size(args.type), width = args.heads * args.head_dim * size;
  for (int64_t r = args.fields * head / args.heads; r < args.fields * (head + 1) / args.heads; ++r)
    for (const Strided* t : tensors) {
      const volatile char* row = static_cast<const char*>(t->data) + ((sample + 1) * t->batch + r * t->field) * size;
      for (int64_t byte = 0; byte < width; byte += 64) __builtin_prefetch(const_cast<const char*>(row) + byte);
    }
}

// Rows of p [fields, NV * W] become exp(x - max), columns from `fields` on 0; inverse[r] = 1 / the row's sum. With
// kNormalise they become the softmax itself. Without, nothing waits for the division.
template <int NV, bool kNormalise>
void softmax_rows(float* p, int64_t fields, float* inverse) {
  const IVec column = lane_index() + (NV - 1) * W;
  for (int64_t r = 0; r < fields; ++r) {
    float* row = p + r * NV * W;
    Vec x[NV];
    for (int i = 0; i < NV; ++i) x[i] = load(row + i * W);
    x[NV - 1] = column >= static_cast<int32_t>(fields) ? splat(-__builtin_inff()) : x[NV - 1];
    Vec top = x[0];
    for (int i = 1; i < NV; ++i) top = vmax(top, x[i]);
    top = max_lanes(top);
    Vec sum = {};
    for (int i = 0; i < NV; ++i) {
      x[i] = exp2_nonpositive((x[i] - top) * kLog2e);  // exactly 1 at the maximum
      sum += x[i];
    }
    inverse[r] = sum_lanes(sum)[0];  // NaN if any logit is
    if (kNormalise) sum = splat(1.0f / inverse[r]);
    for (int i = 0; i < NV; ++i) store(row + i * W, kNormalise ? x[i] * sum : x[i]);
  }
  for (int64_t r = 0; r < fields; r += W) store(inverse + r, 1.0f / load(inverse + r));
}

template <bool kNormalise, int NV = kMax / W>
void softmax(float* p, int64_t fields, int64_t vectors, float* inverse) {
  if (vectors == NV) return softmax_rows<NV, kNormalise>(p, fields, inverse);
  if constexpr (NV > 1) softmax<kNormalise, NV - 1>(p, fields, vectors, inverse);
}

// Rows of p and dp [fields, NV * W] become P * M and dS; without dropout p stays as it is.
template <int NV>
void score_gradient_rows(float* p, float* dp, const float* mask, int64_t mask_pitch, int64_t fields, float scale) {
  for (int64_t r = 0; r < fields; ++r) {
    Vec probability[NV], gradient[NV], sum = {};
    for (int i = 0; i < NV; ++i) {
      probability[i] = load(p + (r * NV + i) * W);
      gradient[i] = load(dp + (r * NV + i) * W);
      if (mask) {
        const Vec multiplier = load(mask + r * mask_pitch + i * W);
        gradient[i] *= multiplier;
        store(p + (r * NV + i) * W, probability[i] * multiplier);
      }
      sum += probability[i] * gradient[i];
    }
    sum = sum_lanes(sum);
    for (int i = 0; i < NV; ++i) store(dp + (r * NV + i) * W, probability[i] * (gradient[i] - sum) * scale);
  }
}

template <int NV = kMax / W>
void score_gradient(float* p, float* dp, const float* mask, int64_t mask_pitch, int64_t fields, float scale,
                    int64_t vectors) {
  if (vectors == NV) return score_gradient_rows<NV>(p, dp, mask, mask_pitch, fields, scale);
  if constexpr (NV > 1) score_gradient<NV - 1>(p, dp, mask, mask_pitch, fields, scale, vectors);
}

// s.p and s.inverse as softmax_rows leaves them for scale Q K^T, pitch = fields rounded up to W; s.mask with pitch
// 32 * groups where dropping.
template <bool kNormalise>
void probabilities(const AttentionArgs& args, const View& q, const View& k, int64_t sample, int64_t head,
                          int64_t pitch, AttentionScratch& s) {
  const int64_t fields = args.fields;
  transpose_block(k.data, k.stride, fields, args.head_dim, s.transposed, pitch);
  gemm<Layout::rows>(fields, pitch, args.head_dim, q.data, q.stride, s.transposed, pitch,
                     StoreScaled{s.p, pitch, args.scale});
  softmax<kNormalise>(s.p, fields, pitch / W, s.inverse);
  if (args.dropout.threshold == 0) return;
  const int64_t groups = (fields + 31) / 32, first = (sample * args.heads + head) * fields * groups;
  for (int64_t group = 0; group < groups; ++group)
    dropout_groups(args.dropout, first + group, groups, fields, s.mask + 32 * group, 32 * groups);
}

inline void forward_head(const AttentionArgs& args, int64_t sample, int64_t head, AttentionScratch& s) {
  const int64_t fields = args.fields, pitch = (fields + W - 1) / W * W;
  const View q = input(args, args.q, sample, head, s.q), k = input(args, args.k, sample, head, s.k);
  const View v = input(args, args.v, sample, head, s.v), out = output(args, args.out, sample, head, s.out);
  probabilities<false>(args, q, k, sample, head, pitch, s);
  if (args.dropout.threshold != 0) {
    const int64_t mask_pitch = (fields + 31) / 32 * 32;
    for (int64_t r = 0; r < fields; ++r)
      for (int64_t c = 0; c < pitch; c += W)
        store(s.p + r * pitch + c, load(s.p + r * pitch + c) * load(s.mask + r * mask_pitch + c));
  }
  gemm<Layout::rows>(fields, args.head_dim, fields, s.p, pitch, v.data, v.stride,
                     StoreRowScaled{out.data, out.stride, s.inverse});
  flush(args, args.out, sample, head, out);
}

inline void backward_head(const AttentionArgs& args, int64_t sample, int64_t head, AttentionScratch& s) {
  const int64_t fields = args.fields, width = args.head_dim, pitch = (fields + W - 1) / W * W;
  const View q = input(args, args.q, sample, head, s.q), k = input(args, args.k, sample, head, s.k);
  const View v = input(args, args.v, sample, head, s.v), go = input(args, args.grad_out, sample, head, s.go);
  const View dq = output(args, args.dq, sample, head, s.dq), dk = output(args, args.dk, sample, head, s.dk);
  const View dv = output(args, args.dv, sample, head, s.dv);
  probabilities<true>(args, q, k, sample, head, pitch, s);
  transpose_block(v.data, v.stride, fields, width, s.transposed, pitch);
  gemm<Layout::rows>(fields, pitch, width, go.data, go.stride, s.transposed, pitch, Store{s.dp, pitch});
  score_gradient(s.p, s.dp, args.dropout.threshold ? s.mask : nullptr, (fields + 31) / 32 * 32, fields, args.scale,
                 pitch / W);
  gemm<Layout::rows>(fields, width, fields, s.dp, pitch, k.data, k.stride, Store{dq.data, dq.stride});
  gemm<Layout::transposed>(fields, width, fields, s.dp, pitch, q.data, q.stride, Store{dk.data, dk.stride});
  gemm<Layout::transposed>(fields, width, fields, s.p, pitch, go.data, go.stride, Store{dv.data, dv.stride});
  flush(args, args.dq, sample, head, dq);
  flush(args, args.dk, sample, head, dk);
  flush(args, args.dv, sample, head, dv);
}

inline void attention_forward(const AttentionArgs& args, int64_t first, int64_t last) {
  AttentionScratch scratch;
  for (int64_t sample = first; sample < last; ++sample)
    for (int64_t head = 0; head < args.heads; ++head) {
      prefetch_next(args, {&args.q, &args.k, &args.v}, sample, last, head);
      forward_head(args, sample, head, scratch);
    }
}

inline void attention_backward(const AttentionArgs& args, int64_t first, int64_t last) {
  AttentionScratch scratch;
  for (int64_t sample = first; sample < last; ++sample)
    for (int64_t head = 0; head < args.heads; ++head) {
      prefetch_next(args, {&args.q, &args.k, &args.v, &args.grad_out}, sample, last, head);
      backward_head(args, sample, head, scratch);
    }
}

}  // namespace CTR_ISA
}  // namespace ctr
