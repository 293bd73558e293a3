// Vectors of CTR_WIDTH floats for one instruction set, as GCC/Clang vector extensions.
// Included once by each isa_*.cpp, which sets CTR_ISA (a namespace) and CTR_WIDTH; everything here lives in that
// namespace, so that code compiled for one instruction set is never linked into another.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace ctr {
namespace CTR_ISA {

constexpr int W = CTR_WIDTH;

typedef float Vec __attribute__((vector_size(CTR_WIDTH * 4)));
typedef int32_t IVec __attribute__((vector_size(CTR_WIDTH * 4)));
typedef float UnalignedVec __attribute__((vector_size(CTR_WIDTH * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }

inline IVec lane_index() {
  IVec lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  return lanes;
}

// The first `count` floats at p, 0 < count < W, and zeros; no other memory is read, or written.
inline Vec load_part(const float* p, int64_t count) {
#if CTR_WIDTH == 16 && defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#elif CTR_WIDTH == 8 && defined(__AVX__)
  return (Vec)_mm256_maskload_ps(p, (__m256i)(lane_index() < static_cast<int32_t>(count)));
#else
  Vec v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}
inline void store_part(float* p, Vec v, int64_t count) {
#if CTR_WIDTH == 16 && defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
#elif CTR_WIDTH == 8 && defined(__AVX__)
  _mm256_maskstore_ps(p, (__m256i)(lane_index() < static_cast<int32_t>(count)), (__m256)v);
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// A store around the caches, to memory that is a multiple of the vector. It pays only where the stores that follow
// each other fill whole lines, and ends with finish_streams before other threads may read.
inline void stream(float* p, Vec v) {
#if CTR_WIDTH == 16 && defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif CTR_WIDTH == 8 && defined(__AVX__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
inline void finish_streams() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}
inline void put(float* p, Vec v, bool around) {
  if (around) stream(p, v);
  else store(p, v);
}

// The larger element; b where either is NaN. GCC does not make one instruction of the comparison and the choice.
inline Vec vmax(Vec a, Vec b) {
#if CTR_WIDTH == 16 && defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#elif CTR_WIDTH == 8 && defined(__AVX__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif CTR_WIDTH == 4 && defined(__SSE__)
  return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller element, alike.
inline Vec vmin(Vec a, Vec b) {
#if CTR_WIDTH == 16 && defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b);
#elif CTR_WIDTH == 8 && defined(__AVX__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#elif CTR_WIDTH == 4 && defined(__SSE__)
  return (Vec)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

inline Vec vabs(Vec v) { return (Vec)((IVec)v & 0x7FFFFFFF); }

#ifdef __clang__
// __builtin_shuffle is GCC's; the loops below are what it stands for.
inline Vec permute(Vec a, IVec index) {
  Vec r;
  for (int i = 0; i < W; ++i) r[i] = a[index[i]];
  return r;
}
inline Vec permute(Vec a, Vec b, IVec index) {
  Vec r;
  for (int i = 0; i < W; ++i) r[i] = index[i] < W ? a[index[i]] : b[index[i] - W];
  return r;
}
#else
inline Vec permute(Vec a, IVec index) { return __builtin_shuffle(a, index); }
inline Vec permute(Vec a, Vec b, IVec index) { return __builtin_shuffle(a, b, index); }
#endif

// Sum and maximum over the lanes, in every lane; a NaN reaches the sum, not always the maximum.
inline Vec sum_lanes(Vec v) {
  for (int bit = 1; bit < W; bit <<= 1) v += permute(v, lane_index() ^ bit);
  return v;
}
inline Vec max_lanes(Vec v) {
  for (int bit = 1; bit < W; bit <<= 1) v = vmax(v, permute(v, lane_index() ^ bit));
  return v;
}

// Lane i: the sum over the lanes of rows[i], which are lost. log2(W) rounds, each adding the halves of pairs of rows.
__attribute__((always_inline)) inline Vec sum_rows(Vec (&rows)[W]) {
  const IVec lanes = lane_index();
#pragma GCC unroll 4
  for (int bit = 1; bit < W; bit <<= 1) {
    const IVec set = (lanes & bit) != 0;  // -1 where the lane's bit is set
    const IVec first = set ? (lanes ^ bit) + W : lanes, second = set ? lanes + W : lanes ^ bit;
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * bit)
      rows[i] = permute(rows[i], rows[i + bit], first) + permute(rows[i], rows[i + bit], second);
  }
  return rows[0];
}

// Casts between vector types of one size keep the bits.
inline Vec bits_to_float(IVec v) { return (Vec)v; }
inline IVec float_to_bits(Vec v) { return (IVec)v; }

// 2^x for x <= 0, relative error below 1e-7; below 2^-126 it is 0 or a denormal; NaN for NaN.
inline Vec exp2_nonpositive(Vec x) {
#if CTR_WIDTH == 16 && defined(__AVX512F__)
  const Vec rounded = (Vec)_mm512_maskz_roundscale_ps(0xFFFF, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const Vec fraction = x - rounded;  // in [-1/2, 1/2]
#else
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const Vec shifted = x + kMagic;
  const Vec fraction = x - (shifted - kMagic);
#endif
  // Minimax polynomial of 2^fraction with constant term 1, relative error 2e-9 (fitted by iterative reweighting).
  Vec p = splat(1.5353362e-4f);
  p = p * fraction + 1.3398875e-3f;
  p = p * fraction + 9.618437e-3f;
  p = p * fraction + 5.5503324e-2f;
  p = p * fraction + 2.4022648e-1f;
  p = p * fraction + 6.931472e-1f;
  p = p * fraction + 1.0f;
#if CTR_WIDTH == 16 && defined(__AVX512F__)
  return (Vec)_mm512_maskz_scalef_ps(0xFFFF, (__m512)p, (__m512)rounded);
#else
  const IVec exponent = (float_to_bits(shifted) - 0x4B400000 + 127) << 23;
  return x < -126.0f ? Vec{} : p * bits_to_float(exponent);
#endif
}

constexpr float kLog2e = 1.4426950408889634f;

// W rows of W floats, transposed in registers: log2(W) rounds, each exchanging blocks between two rows.
__attribute__((always_inline)) inline void transpose(Vec (&rows)[W]) {
  const IVec lanes = lane_index();
#pragma GCC unroll 4
  for (int bit = 1; bit < W; bit <<= 1) {
    const IVec set = (lanes & bit) != 0;  // -1 where the lane's bit is set
    const IVec first = set ? (lanes ^ bit) + W : lanes, second = set ? lanes + W : lanes ^ bit;
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & bit) continue;
      const Vec a = rows[i], b = rows[i | bit];
      rows[i] = permute(a, b, first);
      rows[i | bit] = permute(a, b, second);
    }
  }
}

// out[c * pitch + r] = in[r * stride + c] for r < rows, c < columns; the rest of each out row up to a multiple
// of W is zero. columns is a multiple of W.
inline void transpose_block(const float* in, int64_t stride, int64_t rows, int64_t columns, float* out,
                            int64_t pitch) {
  for (int64_t r = 0; r < rows; r += W) {
    const bool whole = r + W <= rows;  // without questions row by row
    for (int64_t c = 0; c < columns; c += W) {
      Vec block[W];
      const float* from = in + r * stride + c;
      if (whole) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = load(from + i * stride);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = r + i < rows ? load(from + i * stride) : Vec{};
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(out + (c + i) * pitch + r, block[i]);
    }
  }
}

}  // namespace CTR_ISA
}  // namespace ctr
