// What the operators ask of the kernels, and the table of kernels that each instruction set fills.
#pragma once
#include <cstdint>

namespace ctr {

enum class Type { f32, bf16 };  // of inputs and outputs; arithmetic is always fp32

// A [batch, field, width] tensor whose last dimension is contiguous; strides in elements.
struct Strided {
  void* data;
  int64_t batch, field;
};

struct DropoutArgs {
  uint64_t seed;
  uint32_t threshold;  // round(p * 2^31); 0 = no dropout
  float keep_scale;    // 1 / (1 - p)
};

constexpr int64_t kMaxKeys = 128, kMaxHead = 128;  // of attention: fields, and width of a head

struct AttentionArgs {
  Type type;
  int64_t first_sample, samples;  // of the batch, that the tensors begin with; how many they hold
  int64_t queries, keys, heads, head_dim;
  float scale;
  DropoutArgs dropout;
  Strided q, k, v;                // [B, Q, E], [B, F, E] twice
  Strided out;                    // forward: [B, Q, E]
  Strided grad_out, dq, dk, dv;   // backward
  bool around;                    // what is written, fp32 without gaps, goes around the caches
  bool cached;                    // what is read is in the cache
};

// LayerNorm over the last dimension; gamma is null where there is none.
struct NormArgs {
  const float *gamma, *beta;
  float eps;
};

// The last three gate: the hidden is a * act(b) of two halves a | b that w1 makes.
enum class Activation { gelu, gelu_tanh, relu, reglu, geglu, swiglu };
constexpr bool is_gated(Activation activation) { return activation >= Activation::reglu; }

constexpr int64_t kFfnTile = 96;   // tokens of a tile
constexpr int64_t kFfnSlice = 64;  // hidden units of a slice

// Weights are packed in fp32, the hidden in slices of 64 padded with zeros; dp = dim rounded up to 16. halves: 2 where a
// gate makes the hidden, else 1; those of a slice, a then b, lie next to each other in w1 and b1.
struct FfnArgs {
  Type type;
  Activation activation;
  int64_t tokens, dim, dp, hidden, slices, halves;
  DropoutArgs dropout;
  NormArgs norm;             // of x, [dp] padded with zeros, with the residual added to the output
  bool normed_residual;      // the residual is LN(x) instead of x
  const void *x, *grad_out;  // [tokens, dim]
  void* out;                 // [tokens, dim]: y, or the gradient of x
  const float *w1t;          // [slices, halves, dim, 64]
  const float *b1;           // [slices, halves * 64]
  const float *w2t;          // [slices, 64, dp], forward only
  const float *b2;           // [dp], forward only
  const float *w1;           // [slices, halves * 64, dp], backward only
  const float *w2;           // [slices, dim, 64], backward only
};

// Sums over the tokens of one task, in fp32. The first tile writes the weights' sums, the others are zero at the start.
struct FfnGradients {
  float *w1;        // [slices, halves * 64, dp]
  float *w2t;       // [slices, 64, dp]
  float *b1;        // [slices, halves * 64]
  float *b2;        // [dp]
  float *gamma, *beta;  // [dp]; of the norm
};

constexpr int64_t kLinearTile = 96;  // tokens of a tile

// in_p and out_p are in and out rounded up to 16. [tokens, ...] memory is fp32 and contiguous; weights, bias and norm are
// padded with zeros.
struct LinearArgs {
  int64_t tokens, in, in_p, out, out_p;
  const float* x;       // [tokens, in]
  const float* weight;  // forward: [in, out_p], W transposed; backward: [out, in_p], W
  const float* bias;    // [out_p], forward only
  float* y;             // [tokens, out]; backward: the gradient of y, only read
  float* grad_x;        // [tokens, in], backward only
  NormArgs norm;        // of x
  const float* residual;  // forward: [tokens, out], added to y; backward: [tokens, in], added to grad_x
  bool around;            // y or grad_x, in whole lines, is written around the caches
};

// Sums over the tokens of one task; zero at the start.
struct LinearGradients {
  float *weight;        // [out, in_p]
  float *bias;          // [out], in whole vectors
  float *gamma, *beta;  // [in_p]
};

constexpr int64_t kCrossTile = 32, kCrossBackwardTile = 64;  // rows of a tile

// wp and rp are width and rank rounded up to 16; weights are padded with zeros, [B, width] tensors are not.
struct CrossArgs {
  int64_t rows, width, wp, rp;
  const float *x0, *x, *grad;  // [rows, width]; grad: of y, backward only
  const float *ut, *v;         // [width, rp]; v: backward only
  const float *vt, *u;         // [rp, wp]; u: backward only
  const float* bias;           // [wp]
  float *y, *grad_x0, *grad_x;  // [rows, width]; forward, and backward
};

// Sums over the rows of one task, written by its first tile.
struct CrossGradients {
  float *ut, *v;  // [width, rp]
  float* bias;    // [wp]
};

struct Ids {
  const void* data;  // int64 where wide, else int32
  int64_t count;
  bool wide;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// out[i] = table[ids[i]]
struct RowLookup {
  Ids ids;
  const char* table;
  char* out;
  int64_t dim, bytes;  // of a row of the table
  bool widen;          // bf16 rows become fp32
  bool around;         // rows, whole lines then, are written around the caches
};

enum class RowRule { sgd, rowwise_adagrad, adagrad, lazy_adam };

// One step of a rule as ctr_kernels/sparse_update/rule.py defines it.
struct RowUpdate {
  RowRule rule;
  Type weight_type, rows_type, state_type;
  int64_t num_rows, dim;
  void* weight;      // [num_rows, dim]
  const void* rows;  // [n, dim]
  void* first;       // fp32 [num_rows] (rowwise) or [num_rows, dim]; null for SGD
  void* second;      // [num_rows, dim], null but for Adam
  int32_t* last;     // [num_rows], null where decay does not count steps
  float rate, eps;
  float fresh1, fresh2;  // 1 - beta1, 1 - beta2
  float keep;        // what decay leaves of a weight in one step
  double log2_keep;  // its logarithm
  int32_t step;
  uint64_t key;      // of the stochastic rounding of bf16
};

struct KernelTable {
  int width;  // floats of a vector; widths of rows must be multiples of it, but for attention
  void (*attention_forward)(const AttentionArgs&, int64_t first_sample, int64_t last_sample);
  void (*attention_backward)(const AttentionArgs&, int64_t first_sample, int64_t last_sample);
  void (*ffn_forward)(const FfnArgs&, int64_t first_tile, int64_t last_tile);
  void (*ffn_backward)(const FfnArgs&, const FfnGradients&, int64_t first_tile, int64_t last_tile);
  void (*linear_forward)(const LinearArgs&, int64_t first_tile, int64_t last_tile);
  void (*linear_backward)(const LinearArgs&, const LinearGradients&, int64_t first_tile, int64_t last_tile);
  void (*cross_forward)(const CrossArgs&, int64_t first_tile, int64_t last_tile);
  void (*cross_backward)(const CrossArgs&, const CrossGradients&, int64_t first_tile, int64_t last_tile);
  void (*lookup_rows)(const RowLookup&, int64_t first_id, int64_t last_id);
  // sorted[i] = id << 32 | position; whole runs of equal ids.
  void (*update_rows)(const RowUpdate&, const uint64_t* sorted, int64_t n);
};

extern const KernelTable kBaselineKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels, kAvx512Kernels;
#endif

// The widest kernels of the active instruction set whose vectors divide `width`.
const KernelTable& kernels_for(int64_t width);

}  // namespace ctr
