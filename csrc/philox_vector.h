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

inline U64 xor3(U64 a, U64 b, U64 c) {
#if CTR_WIDTH == 16 && defined(__AVX512F__)
  return (U64)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);  // GCC takes two instructions
#else
  return a ^ b ^ c;
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

// philox_pairs of N vectors of counters whose high word is the key's. Each is one long chain of instructions, so that
// several are advanced in turn: a processor does not see far enough ahead to do so by itself.
template <int N>
__attribute__((always_inline)) inline void philox_low(const PhiloxKey& key, const U64 (&counters)[N],
                                                      PhiloxWords (&drawn)[N]) {
  U64 a[N], b[N], c0[N], c1[N], c2[N], c3[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) a[i] = multiply_low(counters[i], 0xD2511F53u);  // round 1
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) b[i] = multiply_low((a[i] >> 32) ^ key.odd[0], 0xCD9E8D57u);  // round 2
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) c0[i] = (b[i] >> 32) ^ key.even[1], c1[i] = b[i], c2[i] = a[i] ^ key.third;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {  // round 3
    const U64 x = multiply_low(c0[i], 0xD2511F53u), y = multiply_low(c2[i], 0xCD9E8D57u);
    c0[i] = (y >> 32) ^ c1[i] ^ key.even[2], c1[i] = y, c2[i] = (x >> 32) ^ key.fourth, c3[i] = x;
  }
#pragma GCC unroll 8
  for (int round = 3; round < 10; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const U64 x = multiply_low(c0[i], 0xD2511F53u), y = multiply_low(c2[i], 0xCD9E8D57u);
      c0[i] = xor3(y >> 32, c1[i], key.even[round] + U64{}), c1[i] = y;
      c2[i] = xor3(x >> 32, c3[i], key.odd[round] + U64{}), c3[i] = x;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) drawn[i] = {{c0[i], c1[i], c2[i], c3[i]}};
}

inline U64 pair_lanes() {
  U64 lanes;
  for (int lane = 0; lane < kPairs; ++lane) lanes[lane] = lane;
  return lanes;
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
    if (counter >> 32 != key.high) replace(counter >> 32);
  }
  __attribute__((noinline, cold)) void replace(uint64_t high) { key = PhiloxKey(seed, high); }
};

constexpr int kGroupVectors = 32 / W;  // of the 32 columns of a group

// The multipliers of the columns of kGroups groups that follow each other, in their order; their counters share the high
// word, as they do where kGroups divides the first.
template <int kGroups>
__attribute__((always_inline)) inline void group_multipliers(const Dropping& dropping, uint64_t group,
                                                             Vec (&out)[kGroups * kGroupVectors]) {
  constexpr int kParts = kGroups * 8 / kPairs;  // vectors of counters
  U64 counters[kParts];
  PhiloxWords drawn[kParts];
#pragma GCC unroll 16
  for (int part = 0; part < kParts; ++part) counters[part] = pair_lanes() + (group * 8 + part * kPairs);
  philox_low(dropping.key, counters, drawn);
  if constexpr (kPairs == 8) {  // a vector of floats has two words of all lanes
#pragma GCC unroll 16
    for (int v = 0; v < kGroups * 2; ++v)
      out[v] = dropping.multipliers(low_words(drawn[v / 2].word[v % 2 * 2], drawn[v / 2].word[v % 2 * 2 + 1]));
  } else {
    constexpr int kEach = 8 / kPairs;  // vectors of counters of a group
#pragma GCC unroll 32
    for (int v = 0; v < kGroups * kGroupVectors; ++v) {
      const int group_of = v / kGroupVectors, word = v % kGroupVectors * W / 8, part = v % (8 / W) * 2;
      out[v] = dropping.multipliers(low_words(drawn[group_of * kEach + part].word[word],
                                              drawn[group_of * kEach + part + 1].word[word]));
    }
  }
}

// The same transposed: out[c * pitch + i] for the columns c < columns of group first + i * stride, i < rows. rows is at
// most W; what lies beyond it in the W floats of a column is arbitrary, but written.
inline void dropout_columns(Dropping& dropping, uint64_t first, uint64_t stride, int64_t rows, int64_t columns,
                            float* out, int64_t pitch) {
  const U64 low = (pair_lanes() * stride + first) * 8, high = low + kPairs * stride * 8;
  dropping.take_high(first * 8);
  const bool shared = ((first + W * stride) * 8) >> 32 == dropping.key.high;
  const auto write = [&](int64_t lane, const PhiloxWords& a, const PhiloxWords& b) __attribute__((always_inline)) {
    for (int word = 0; word < 4 && word * 8 + lane < columns; ++word)
      store(out + (word * 8 + lane) * pitch, dropping.multipliers(low_words(a.word[word], b.word[word])));
  };
  const uint64_t lanes = columns < 8 ? columns : 8;
  if (!shared) {
    for (uint64_t lane = 0; lane < lanes; ++lane)
      write(lane, philox_pairs(dropping.seed, low + lane), philox_pairs(dropping.seed, high + lane));
  } else if (rows <= kPairs) {
    for (uint64_t lane = 0; lane < lanes; lane += 4) {
      PhiloxWords drawn[4];
      philox_low(dropping.key, {low + lane, low + (lane + 1), low + (lane + 2), low + (lane + 3)}, drawn);
      for (uint64_t i = 0; i < 4 && lane + i < lanes; ++i) write(lane + i, drawn[i], drawn[i]);
    }
  } else {
    for (uint64_t lane = 0; lane < lanes; lane += 2) {
      PhiloxWords drawn[4];
      philox_low(dropping.key, {low + lane, high + lane, low + (lane + 1), high + (lane + 1)}, drawn);
      write(lane, drawn[0], drawn[1]);
      if (lane + 1 < lanes) write(lane + 1, drawn[2], drawn[3]);
    }
  }
}

}  // namespace CTR_ISA
}  // namespace ctr
