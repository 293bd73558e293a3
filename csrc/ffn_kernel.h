// The feed-forward network on tiles of 96 tokens, its hidden in slices of 64 units that never leave the cache.
//
// Forward, a slice: A = X W1^T + b1; H = act(A) * M; Y += H W2^T. M: the multipliers of dropout.
// With a gate the slice has 64 units of both halves, A | B, and H = A * act(B) * M.
// As half a layer, X is a LayerNorm N of the input, and Y starts as the residual instead of 0.
// Backward, A and H recomputed: dH = dY W2; dA = dH * M * act'(A), or dA | dB = dH * M * (act(B) | A * act'(B));
// dX += dA W1; dW1 += dA^T X; dW2^T += H^T dY; db1 += columnsum(dA); db2 += columnsum(dY).
#pragma once
#include "activation.h"
#include "buffer.h"
#include "convert.h"
#include "gemm.h"
#include "norm_kernel.h"
#include "philox_vector.h"
#include "sums.h"

namespace ctr {
namespace CTR_ISA {

constexpr int64_t kSlice = kFfnSlice;

// Columns that the first layer makes for a slice.
constexpr int64_t slice_width(Activation activation) { return is_gated(activation) ? 2 * kSlice : kSlice; }

struct Tile {
  int64_t first, rows;  // tokens
};

inline Tile tile_at(const FfnArgs& args, int64_t index) {
  const int64_t first = index * kFfnTile, left = args.tokens - first;
  return {first, left < kFfnTile ? left : kFfnTile};
}

inline int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }

// Rows of x or grad_out with pitch dp: in place where the memory allows it, else through the scratch.
inline const float* tile_rows(const FfnArgs& args, const void* tensor, const Tile& tile, float* scratch) {
  const char* from = static_cast<const char*>(tensor) + tile.first * args.dim * bytes_of(args.type);
  if (args.type == Type::f32 && args.dp == args.dim) return reinterpret_cast<const float*>(from);
  read_rows(args.type, from, args.dim, tile.rows, args.dim, scratch, args.dp);
  return scratch;
}
inline float* tile_out(const FfnArgs& args, const Tile& tile, float* scratch) {
  if (args.type != Type::f32 || args.dp != args.dim) return scratch;
  return static_cast<float*>(args.out) + tile.first * args.dim;
}
inline void flush_tile(const FfnArgs& args, const Tile& tile, const float* rows) {
  if (args.type == Type::f32 && args.dp == args.dim) return;
  write_rows(args.type, rows, args.dp, tile.rows, args.dim,
             static_cast<char*>(args.out) + tile.first * args.dim * bytes_of(args.type), args.dim);
}

// Dropout of one slice of a tile's hidden units: the groups of 32 units of row r begin at first + r * stride.
struct SliceDropout {
  uint64_t first, stride;
};

inline SliceDropout slice_dropout(const FfnArgs& args, const Tile& tile, int64_t slice) {
  const int64_t groups = (args.hidden + 31) / 32;
  return {static_cast<uint64_t>(tile.first * groups + slice * (kSlice / 32)), static_cast<uint64_t>(groups)};
}

// Those of a row's 64 units. Two groups at once, unless their counters do not share the high word.
__attribute__((always_inline)) inline void slice_multipliers(Dropping& dropping, uint64_t group,
                                                             Vec (&out)[kSlice / W]) {
  dropping.take_high(group * 8);
  if (((group + 1) * 8) >> 32 == dropping.key.high) {
    group_multipliers<2>(dropping, group, out);
  } else {
    Vec half[kGroupVectors];
    for (int i = 0; i < 2; ++i) {
      dropping.take_high((group + i) * 8);
      group_multipliers<1>(dropping, group + i, half);
      for (int v = 0; v < kGroupVectors; ++v) out[i * kGroupVectors + v] = half[v];
    }
  }
}

// H of a row's vector: A where there is no gate, else A and B.
template <Activation kActivation>
inline Vec hidden_of(const float* row, int64_t at) {
  if constexpr (is_gated(kActivation)) return load(row + at) * activate<kActivation>(load(row + kSlice + at)).value;
  return activate<kActivation>(load(row + at)).value;
}

// made [rows, width]: A, or A | B; its first 64 columns become H. The masks are drawn in the same loop as the activation:
// random numbers are integer work in long chains, next to which the polynomials cost less than they do alone.
template <Activation kActivation>
void activate_slice(float* made, Dropping* dropping, const SliceDropout& at, int64_t rows) {
  constexpr int64_t width = slice_width(kActivation);
  if (dropping == nullptr) {
    constexpr int64_t span = is_gated(kActivation) ? kSlice : kFfnTile * kSlice;  // without a gate the tile has no gaps
    for (int64_t r = 0; r < rows; r += span / kSlice, made += width)
      for (int64_t c = 0; c < span && c < (rows - r) * kSlice; c += W) store(made + c, hidden_of<kActivation>(made, c));
    return;
  }
  for (int64_t r = 0; r < rows; ++r, made += width) {
    Vec multipliers[kSlice / W];
    slice_multipliers(*dropping, at.first + r * at.stride, multipliers);
    for (int v = 0; v < kSlice / W; ++v) store(made + v * W, hidden_of<kActivation>(made, v * W) * multipliers[v]);
  }
}

// made [rows, width]: A -> dA, or A | B -> dA | dB; grad [rows, 64]: dH -> H.
template <Activation kActivation>
void differentiate_slice(float* made, float* grad, Dropping* dropping, const SliceDropout& at, int64_t rows) {
  constexpr int64_t width = slice_width(kActivation);
  for (int64_t r = 0; r < rows; ++r, made += width, grad += kSlice) {
    Vec multipliers[kSlice / W];
    if (dropping != nullptr) slice_multipliers(*dropping, at.first + r * at.stride, multipliers);
    for (int v = 0; v < kSlice / W; ++v) {
      float *const a = made + v * W, *const b = a + width - kSlice;  // one and the same without a gate
      ValueAndSlope h = activate<kActivation>(load(b));
      if (dropping != nullptr) {
        h.value *= multipliers[v];
        h.slope *= multipliers[v];
      }
      const Vec g = load(grad + v * W);
      if constexpr (is_gated(kActivation)) {
        const Vec passed = load(a);
        store(a, g * h.value);
        store(b, g * h.slope * passed);  // in this order 0 where the slope is, however large the rest
        h.value *= passed;
      } else {
        store(a, g * h.slope);
      }
      store(grad + v * W, h.value);
    }
  }
}

// A, or A | B, of a slice: x [rows, dp] -> out [rows, width].
template <Activation kActivation>
void hidden_layer(const FfnArgs& args, int64_t slice, const float* x, int64_t rows, float* out) {
  constexpr int64_t width = slice_width(kActivation);
  for (int64_t half = 0; half < width; half += kSlice)
    gemm<Layout::rows>(rows, kSlice, args.dim, x, args.dp, args.w1t + (slice * width + half) * args.dim, kSlice,
                       StoreBiased{out + half, width, args.b1 + slice * width + half});
}

template <Activation kActivation>
void forward_tiles(const FfnArgs& args, int64_t first, int64_t last) {
  constexpr int64_t width = slice_width(kActivation);
  const int64_t dp = args.dp;
  const Buffer x_rows(kFfnTile * dp), y_rows(kFfnTile * dp), hidden(kFfnTile * width);
  const Buffer normed(args.norm.gamma ? kFfnTile * dp : 0);
  Dropping drawn(args.dropout), *const dropping = args.dropout.threshold != 0 ? &drawn : nullptr;
  for (int64_t index = first; index < last; ++index) {
    const Tile tile = tile_at(args, index);
    const float* x = tile_rows(args, args.x, tile, x_rows.get());
    const float* residual = nullptr;
    if (args.norm.gamma != nullptr) {
      normalise_rows(args.norm, x, tile.rows, args.dim, dp, normed.get(), nullptr);
      residual = args.normed_residual ? normed.get() : x;
      x = normed.get();
    }
    float* y = tile_out(args, tile, y_rows.get());
    for (int64_t slice = 0; slice < args.slices; ++slice) {
      hidden_layer<kActivation>(args, slice, x, tile.rows, hidden.get());
      activate_slice<kActivation>(hidden.get(), dropping, slice_dropout(args, tile, slice), tile.rows);
      const float* w2t = args.w2t + slice * kSlice * dp;
      if (slice == 0 && residual != nullptr)
        gemm<Layout::rows>(tile.rows, dp, kSlice, hidden.get(), width, w2t, dp,
                           StoreResidual{y, dp, args.b2, residual});
      else if (slice == 0)
        gemm<Layout::rows>(tile.rows, dp, kSlice, hidden.get(), width, w2t, dp, StoreBiased{y, dp, args.b2});
      else
        gemm<Layout::rows>(tile.rows, dp, kSlice, hidden.get(), width, w2t, dp, Add{y, dp});
    }
    flush_tile(args, tile, y);
  }
}

// Sums over tokens: the first tile of a task writes them, so that they need not be zero before.
inline void add_product(bool writes, int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda,
                        const float* b, float* out) {
  if (writes)
    gemm<Layout::transposed>(rows, columns, depth, a, lda, b, columns, Store{out, columns});
  else
    gemm<Layout::transposed>(rows, columns, depth, a, lda, b, columns, Add{out, columns});
}

template <Activation kActivation>
void backward_tiles(const FfnArgs& args, const FfnGradients& sums, int64_t first, int64_t last) {
  constexpr int64_t width = slice_width(kActivation);
  const int64_t dp = args.dp;
  const Buffer x_rows(kFfnTile * dp), gy_rows(kFfnTile * dp), gx_rows(kFfnTile * dp);
  const Buffer hidden(kFfnTile * width), grad(kFfnTile * kSlice);
  const Buffer normed(args.norm.gamma ? kFfnTile * dp : 0);
  Dropping drawn(args.dropout), *const dropping = args.dropout.threshold != 0 ? &drawn : nullptr;
  RowMoments kept[kFfnTile];
  for (int64_t index = first; index < last; ++index) {
    const Tile tile = tile_at(args, index);
    const float *input = tile_rows(args, args.x, tile, x_rows.get()), *x = input;
    const float* gy = tile_rows(args, args.grad_out, tile, gy_rows.get());
    float *out = tile_out(args, tile, gx_rows.get()), *gx = out;
    if (args.norm.gamma != nullptr) {
      normalise_rows(args.norm, input, tile.rows, args.dim, dp, normed.get(), kept);
      x = normed.get();
      gx = gx_rows.get();  // of the norm's output
    }
    add_columns(gy, dp, tile.rows, dp, sums.b2);
    for (int64_t slice = 0; slice < args.slices; ++slice) {
      const int64_t unit = slice * kSlice, row = slice * width;  // of W2^T, and of W1
      hidden_layer<kActivation>(args, slice, x, tile.rows, hidden.get());
      gemm<Layout::rows>(tile.rows, kSlice, args.dim, gy, dp, args.w2 + unit * args.dim, kSlice,
                         Store{grad.get(), kSlice});
      differentiate_slice<kActivation>(hidden.get(), grad.get(), dropping, slice_dropout(args, tile, slice), tile.rows);
      add_columns(hidden.get(), width, tile.rows, width, sums.b1 + row);
      const float* w1 = args.w1 + row * dp;
      if (slice == 0 && args.normed_residual)
        gemm<Layout::rows>(tile.rows, dp, width, hidden.get(), width, w1, dp, StorePlus{gx, dp, gy});
      else if (slice == 0)
        gemm<Layout::rows>(tile.rows, dp, width, hidden.get(), width, w1, dp, Store{gx, dp});
      else
        gemm<Layout::rows>(tile.rows, dp, width, hidden.get(), width, w1, dp, Add{gx, dp});
      add_product(index == first, width, dp, tile.rows, hidden.get(), width, x, sums.w1 + row * dp);
      add_product(index == first, kSlice, dp, tile.rows, grad.get(), kSlice, gy, sums.w2t + unit * dp);
    }
    if (args.norm.gamma != nullptr)
      differentiate_rows(args.norm, input, kept, gx, args.normed_residual ? nullptr : gy, tile.rows, args.dim, dp, out,
                         false, sums.gamma, sums.beta, normed.get());
    flush_tile(args, tile, out);
  }
}

inline void ffn_forward(const FfnArgs& args, int64_t first, int64_t last) {
  switch (args.activation) {
    case Activation::gelu: return forward_tiles<Activation::gelu>(args, first, last);
    case Activation::gelu_tanh: return forward_tiles<Activation::gelu_tanh>(args, first, last);
    case Activation::relu: return forward_tiles<Activation::relu>(args, first, last);
    case Activation::reglu: return forward_tiles<Activation::reglu>(args, first, last);
    case Activation::geglu: return forward_tiles<Activation::geglu>(args, first, last);
    case Activation::swiglu: return forward_tiles<Activation::swiglu>(args, first, last);
  }
}

inline void ffn_backward(const FfnArgs& args, const FfnGradients& sums, int64_t first, int64_t last) {
  switch (args.activation) {
    case Activation::gelu: return backward_tiles<Activation::gelu>(args, sums, first, last);
    case Activation::gelu_tanh: return backward_tiles<Activation::gelu_tanh>(args, sums, first, last);
    case Activation::relu: return backward_tiles<Activation::relu>(args, sums, first, last);
    case Activation::reglu: return backward_tiles<Activation::reglu>(args, sums, first, last);
    case Activation::geglu: return backward_tiles<Activation::geglu>(args, sums, first, last);
    case Activation::swiglu: return backward_tiles<Activation::swiglu>(args, sums, first, last);
  }
}

}  // namespace CTR_ISA
}  // namespace ctr
