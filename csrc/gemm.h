// Small matrix products out of L1/L2: C[m, n] = sum_k A[m, k] B[k, n], the accumulators in registers.
// B is row-major with n contiguous; A is read one scalar at a time, either row-major or transposed.
#pragma once
#include "simd.h"

namespace ctr {
namespace CTR_ISA {

// Rows and vectors of a register tile. 32 registers: 24-28 accumulators; 16 registers: 12.
constexpr int kTileVectors = CTR_WIDTH == 16 ? 4 : 2;
constexpr int max_rows(int vectors) {
  return CTR_WIDTH == 16 ? (vectors == 1 ? 14 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6) : (vectors == 1 ? 10 : 6);
}

enum class Layout { rows, transposed };  // of A: A[m * lda + k], or A[k * lda + m]

// A row pitch that the compiler knows: elements of A are then read at fixed displacements.
template <int64_t kValue>
struct Constant {
  constexpr operator int64_t() const { return kValue; }
};

// What is done with the sums: out = sum, out = sum * scale of the row, out += sum, out = sum + bias[n], and
// out = sum + other, out = sum + bias[n] + residual. around: whether out is streamed (see simd.h).
struct Store {
  float* out;
  int64_t pitch;
  bool around = false;
  void operator()(int64_t m, int64_t n, Vec sum) const { put(out + m * pitch + n, sum, around); }
};
struct StoreRowScaled {
  float* out;
  int64_t pitch;
  const float* scale;  // of each row
  bool around;
  void operator()(int64_t m, int64_t n, Vec sum) const { put(out + m * pitch + n, sum * scale[m], around); }
};
struct Add {
  float* out;
  int64_t pitch;
  void operator()(int64_t m, int64_t n, Vec sum) const {
    store(out + m * pitch + n, load(out + m * pitch + n) + sum);
  }
};
struct StoreBiased {
  float* out;
  int64_t pitch;
  const float* bias;
  bool around = false;
  void operator()(int64_t m, int64_t n, Vec sum) const { put(out + m * pitch + n, sum + load(bias + n), around); }
};
struct StorePlus {
  float* out;
  int64_t pitch;  // of both
  const float* other;
  bool around = false;
  void operator()(int64_t m, int64_t n, Vec sum) const {
    put(out + m * pitch + n, sum + load(other + m * pitch + n), around);
  }
};
struct StoreResidual {
  float* out;
  int64_t pitch;  // of both
  const float *bias, *residual;
  bool around = false;
  void operator()(int64_t m, int64_t n, Vec sum) const {
    put(out + m * pitch + n, sum + load(bias + n) + load(residual + m * pitch + n), around);
  }
};

// What sums are added to is fetched while they are made: it is in the second-level cache or beyond.
template <class Finish>
inline void fetch(const Finish&, int64_t, int64_t) {}
__attribute__((always_inline)) inline void fetch(const Add& add, int64_t m, int64_t n) {
  __builtin_prefetch(add.out + m * add.pitch + n, 1);
}

// What is made of each column of the sums, a whole tile at once; nothing here (see attention_scores.h).
template <int R, int NV, class Finish>
inline void reduce(const Finish&, int64_t, int64_t, const Vec*) {}

// The accumulators have one index and simple loops: GCC keeps an array in registers where it unrolls all loops over it
// early, which it does to innermost ones only. Else they pass through the stack at both ends of a tile.
template <int R, int NV, Layout kLayout, class Lda, class Ldb, class Finish>
inline void tile(const float* a, Lda lda, const float* b, Ldb ldb, int64_t depth, int64_t m, int64_t n,
                 Finish finish) {
  Vec acc[R * NV];
#pragma GCC unroll 32
  for (int i = 0; i < R * NV; ++i) acc[i] = Vec{};
#pragma GCC unroll 32
  for (int i = 0; i < R * NV; ++i) fetch(finish, m + i / NV, n + i % NV * W);
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    Vec columns[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) columns[v] = load(b + k * ldb + v * W);
#pragma GCC unroll 32
    for (int i = 0; i < R * NV; ++i)
      acc[i] += splat(kLayout == Layout::rows ? a[i / NV * lda + k] : a[k * lda + i / NV]) * columns[i % NV];
  };
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    step(k);
    step(k + 1);
    step(k + 2);
    step(k + 3);
  }
  for (int64_t left = depth & 3; left > 0; --left, ++k) step(k);
#pragma GCC unroll 32
  for (int i = 0; i < R * NV; ++i) finish(m + i / NV, n + i % NV * W, acc[i]);
  reduce<R, NV>(finish, m, n, acc);
}

template <int R, int NV, Layout kLayout, class Lda, class Ldb, class Finish>
inline void tile_of(int64_t rows, const float* a, Lda lda, const float* b, Ldb ldb, int64_t depth, int64_t m,
                    int64_t n, Finish finish) {
  if (rows == R) return tile<R, NV, kLayout>(a, lda, b, ldb, depth, m, n, finish);
  if constexpr (R > 1) tile_of<R - 1, NV, kLayout>(rows, a, lda, b, ldb, depth, m, n, finish);
}

// One panel of NV vectors: all rows, in chunks as equal as they can be.
template <int NV, Layout kLayout, class Lda, class Ldb, class Finish>
__attribute__((noinline)) void panel(int64_t rows, int64_t depth, const float* a, Lda lda, const float* b,
                                     Ldb ldb, int64_t n, Finish finish) {
  constexpr int kMax = max_rows(NV);
  const int64_t chunks = (rows + kMax - 1) / kMax;
  for (int64_t chunk = 0, m = 0; chunk < chunks; ++chunk) {
    const int64_t now = (rows - m + chunks - chunk - 1) / (chunks - chunk);
    tile_of<kMax, NV, kLayout>(now, kLayout == Layout::rows ? a + m * lda : a + m, lda, b + n, ldb, depth, m, n,
                               finish);
    m += now;
  }
}

// finish(m, n, sums of columns n..n+W-1) for all m < rows and n < columns (a multiple of W).
template <Layout kLayout, class Lda, class Ldb, class Finish>
inline void gemm(int64_t rows, int64_t columns, int64_t depth, const float* a, Lda lda, const float* b,
                 Ldb ldb, Finish finish) {
  int64_t n = 0;
  for (; n + kTileVectors * W <= columns; n += kTileVectors * W)
    panel<kTileVectors, kLayout>(rows, depth, a, lda, b, ldb, n, finish);
  if constexpr (kTileVectors > 2) {
    if (n + 3 * W <= columns) {
      panel<3, kLayout>(rows, depth, a, lda, b, ldb, n, finish);
      n += 3 * W;
    } else if (n + 2 * W <= columns) {
      panel<2, kLayout>(rows, depth, a, lda, b, ldb, n, finish);
      n += 2 * W;
    }
  }
  for (; n < columns; n += W) panel<1, kLayout>(rows, depth, a, lda, b, ldb, n, finish);
}

}  // namespace CTR_ISA
}  // namespace ctr
