// Dropout multipliers drawn as ctr_kernels/philox.py defines them, many counters at a time.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace ctr {
namespace CTR_ISA {

constexpr int kPairs = W / 2;  // 64-bit lanes of a vector
typedef uint64_t U64 __attribute__((vector_size(CTR_WIDTH * 4)));
typedef uint32_t U32 __attribute__((vector_size(CTR_WIDTH * 4)));

// Product of the low 32 bits of each 64-bit lane with a constant.
inline U64 multiply_low(U64 a, uint32_t b) {
  const U64 wide = uint64_t{b} - U64{};
#if CTR_WIDTH == 16 && defined(__AVX512F__)
  return (U64)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)wide);  // unmasked, GCC 12 warns falsely
#elif CTR_WIDTH == 8 && defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)wide);
#elif CTR_WIDTH == 4 && defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, (__m128i)wide);
#else
  return (a & 0xFFFFFFFFu) * wide;
#endif
}

struct PhiloxWords {
  U64 word[4];  // in the low 32 bits of each lane; the high bits are not meaningful
};

inline PhiloxWords philox_pairs(uint64_t seed, U64 counter) {
  U64 c0 = counter, c1 = counter >> 32, c2 = {}, c3 = {};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const U64 a = multiply_low(c0, 0xD2511F53u), b = multiply_low(c2, 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ uint64_t{k0};
    c2 = (a >> 32) ^ c3 ^ uint64_t{k1};
    c1 = b;
    c3 = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The multipliers of the counters even[0], odd[0], even[1], odd[1], ...: word w of each in w.
struct Multipliers {
  Vec word[4];
};
inline Multipliers draw(const DropoutArgs& dropout, U64 even, U64 odd) {
  const int32_t threshold = static_cast<int32_t>(dropout.threshold);
  const PhiloxWords low = philox_pairs(dropout.seed, even), high = philox_pairs(dropout.seed, odd);
  Multipliers result;
  for (int word = 0; word < 4; ++word) {
    const U64 both = (low.word[word] & 0xFFFFFFFFu) | (high.word[word] << 32);
    const IVec drawn = (IVec)((U32)both >> 1);
    result.word[word] = drawn >= threshold ? splat(dropout.keep_scale) : Vec{};
  }
  return result;
}

// out[i * pitch + 0..31] = keep_scale or 0 for the 32 columns of group first_group + i * stride, i < groups.
inline void dropout_groups(const DropoutArgs& dropout, uint64_t first_group, uint64_t stride, int64_t groups,
                           float* out, int64_t pitch) {
  constexpr int kAtOnce = W > 8 ? W / 8 : 1;  // groups in one vector
  constexpr int kParts = W < 8 ? 8 / W : 1;   // vectors for the 8 lanes of one group
  U64 even_offset, odd_offset;  // of the counters, from that of group i's first lane
  for (int lane = 0; lane < kPairs; ++lane) {
    even_offset[lane] = (2 * lane / 8) * stride * 8 + 2 * lane % 8;
    odd_offset[lane] = even_offset[lane] + 1;
  }
  for (int64_t i = 0; i < groups; i += kAtOnce)
    for (int part = 0; part < kParts; ++part) {
      const uint64_t first = (first_group + i * stride) * 8 + part * W;
      const U64 even = even_offset + first, odd = odd_offset + first;
      const Multipliers drawn = draw(dropout, even, odd);
      for (int word = 0; word < 4; ++word) {
        const Vec multiplier = drawn.word[word];
        if constexpr (W <= 8) {
          store(out + i * pitch + word * 8 + part * W, multiplier);
        } else {
          for (int half = 0; half < kAtOnce && i + half < groups; ++half)
            std::memcpy(out + (i + half) * pitch + word * 8, reinterpret_cast<const float*>(&multiplier) + half * 8,
                        32);
        }
      }
    }
}

// The same transposed: out[c * pitch + i] for the columns c = 0..31 of group first_group + i * stride, i < W.
inline void dropout_columns(const DropoutArgs& dropout, uint64_t first_group, uint64_t stride, float* out,
                            int64_t pitch) {
  U64 even, odd;
  for (int lane = 0; lane < kPairs; ++lane) {
    even[lane] = (first_group + 2 * lane * stride) * 8;
    odd[lane] = even[lane] + stride * 8;
  }
  for (uint64_t lane = 0; lane < 8; ++lane) {
    const Multipliers drawn = draw(dropout, even + lane, odd + lane);
    for (int word = 0; word < 4; ++word) store(out + (word * 8 + lane) * pitch, drawn.word[word]);
  }
}

}  // namespace CTR_ISA
}  // namespace ctr
