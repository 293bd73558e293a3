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

// What the rounds need beside the low words of counters that share their high word: round keys as they are added, and
// what rounds 1 and 2 make of that word alone, so that they take one product each in place of two.
struct PhiloxKey {
  uint64_t high;  // of the counters
  uint64_t even[10], odd[10];
  uint64_t third, fourth;

  PhiloxKey(uint64_t seed, uint64_t high_word) : high(high_word) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      even[round] = k0;
      odd[round] = k1;
    }
    const uint64_t product = uint64_t{static_cast<uint32_t>(high ^ even[0])} * 0xD2511F53u;
    third = (product >> 32) ^ odd[1];
    fourth = static_cast<uint32_t>(product) ^ odd[2];
  }
};

// philox_pairs of counters whose high word is the key's.
__attribute__((always_inline)) inline PhiloxWords philox_low(const PhiloxKey& key, U64 counter) {
  U64 a = multiply_low(counter, 0xD2511F53u);                        // round 1
  U64 b = multiply_low((a >> 32) ^ key.odd[0], 0xCD9E8D57u);         // round 2
  U64 c0 = (b >> 32) ^ key.even[1], c1 = b, c2 = a ^ key.third, c3;
  a = multiply_low(c0, 0xD2511F53u), b = multiply_low(c2, 0xCD9E8D57u);  // round 3
  c0 = (b >> 32) ^ c1 ^ key.even[2], c1 = b, c2 = (a >> 32) ^ key.fourth, c3 = a;
#pragma GCC unroll 10
  for (int round = 3; round < 10; ++round) {
    a = multiply_low(c0, 0xD2511F53u), b = multiply_low(c2, 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ key.even[round];
    c2 = (a >> 32) ^ c3 ^ key.odd[round];
    c1 = b;
    c3 = a;
  }
  return {{c0, c1, c2, c3}};
}

// The low words of all lanes of a, then those of b.
inline U32 low_words(U64 a, U64 b) { return (U32)permute((Vec)a, (Vec)b, lane_index() * 2); }

// Dropout multipliers: keep_scale where a word is above 2 threshold - 1, so that (word >> 1) >= threshold; else 0.
struct Dropping {
  uint64_t seed;
  uint32_t limit;
  float keep_scale;
  PhiloxKey key;

  explicit Dropping(const DropoutArgs& args)
      : seed(args.seed), limit(2 * args.threshold - 1), keep_scale(args.keep_scale), key(args.seed, 0) {}
  Vec multipliers(U32 words) const { return words > limit ? splat(keep_scale) : Vec{}; }
  void take_high(uint64_t counter) {
    if (counter >> 32 != key.high) key = PhiloxKey(seed, counter >> 32);
  }
};

constexpr int kGroupVectors = 32 / W;  // of the 32 columns of a group

// The multipliers of a group's columns, in their order.
__attribute__((always_inline)) inline void group_multipliers(Dropping& dropping, uint64_t group,
                                                             Vec (&out)[kGroupVectors]) {
  constexpr int kParts = 8 / kPairs;  // vectors of counters
  dropping.take_high(group * 8);
  U64 lanes;
  for (int lane = 0; lane < kPairs; ++lane) lanes[lane] = lane;
  PhiloxWords drawn[kParts];
  for (int part = 0; part < kParts; ++part) drawn[part] = philox_low(dropping.key, lanes + (group * 8 + part * kPairs));
  if constexpr (kParts == 1) {  // a vector of floats has two words of all lanes
    for (int v = 0; v < kGroupVectors; ++v)
      out[v] = dropping.multipliers(low_words(drawn[0].word[2 * v], drawn[0].word[2 * v + 1]));
  } else {
    for (int word = 0, v = 0; word < 4; ++word)
      for (int part = 0; part < kParts; part += 2, ++v)
        out[v] = dropping.multipliers(low_words(drawn[part].word[word], drawn[part + 1].word[word]));
  }
}

// The same transposed: out[c * pitch + i] for the columns c < columns of group first + i * stride, i < rows. rows is at
// most W; what lies beyond it in the W floats of a column is arbitrary, but written.
inline void dropout_columns(Dropping& dropping, uint64_t first, uint64_t stride, int64_t rows, int64_t columns,
                            float* out, int64_t pitch) {
  U64 low, high;
  for (int lane = 0; lane < kPairs; ++lane) {
    low[lane] = (first + lane * stride) * 8;
    high[lane] = low[lane] + kPairs * stride * 8;
  }
  dropping.take_high(first * 8);
  const bool shared = ((first + W * stride) * 8) >> 32 == dropping.key.high, half = rows <= kPairs;
  for (int64_t lane = 0; lane < 8 && lane < columns; ++lane) {
    const uint64_t add = static_cast<uint64_t>(lane);
    const PhiloxWords a = shared ? philox_low(dropping.key, low + add) : philox_pairs(dropping.seed, low + add);
    PhiloxWords b = a;
    if (!half) b = shared ? philox_low(dropping.key, high + add) : philox_pairs(dropping.seed, high + add);
    float* to = out + lane * pitch;
    for (int word = 0; word < 4 && word * 8 + lane < columns; ++word)
      store(to + word * 8 * pitch, dropping.multipliers(low_words(a.word[word], b.word[word])));
  }
}

}  // namespace CTR_ISA
}  // namespace ctr
