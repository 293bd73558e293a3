// ctr::parse_criteo: raw Criteo lines to features in one pass, as train/data/parse.py does it in whole-array operations.
#include <cstring>

#include "tensor_args.h"

namespace ctr {
namespace {

constexpr int kNumbers = 13, kStrings = 26, kMaxDigits = 18, kHex = 8;
constexpr uint32_t kBasis = 2166136261u, kSalt = 42, kPrime = 16777619u;  // FNV-1a; the salt is the protocol's

struct Cursor {
  const uint8_t* at;
  const uint8_t* end;
  bool take(uint8_t byte) { return at < end && *at == byte && (++at, true); }
};

// An integer, or nothing (*missing). False where something else stands.
bool read_integer(Cursor& text, int64_t* value, bool* missing) {
  const uint8_t* begin = text.at;
  const bool negative = text.take('-');
  const uint8_t* first = text.at;
  int64_t sum = 0;
  while (text.at < text.end && static_cast<uint8_t>(*text.at - '0') < 10) {
    if (text.at - first == kMaxDigits) return false;
    sum = sum * 10 + (*text.at++ - '0');
  }
  *value = negative ? -sum : sum;
  *missing = text.at == begin;
  return text.at > first || *missing;
}

bool is_hex(uint8_t c) { return static_cast<uint8_t>(c - '0') < 10 || static_cast<uint8_t>(c - 'a') < 6; }

// Whether all eight bytes are lowercase hexadecimal digits. Bytes are below 0x80 when they are added to, so that no
// carry leaves one: a sum's top bit says that the byte is at least so much.
bool is_hex8(uint64_t word) {
  constexpr uint64_t ones = 0x0101010101010101u, tops = ones * 0x80;
  const uint64_t low = word & ~tops;
  const uint64_t digit = (low + ones * (0x80 - '0')) & ~(low + ones * (0x80 - '9' - 1));
  const uint64_t letter = (low + ones * (0x80 - 'a')) & ~(low + ones * (0x80 - 'f' - 1));
  return ((digit | letter) & ~word & tops) == tops;
}

// FNV-1a of the lowercase hexadecimal characters that stand here, eight at most, from *hash on.
void read_string(Cursor& text, uint32_t* hash, bool* missing) {
  uint64_t word;
  if (text.end - text.at > kHex && (std::memcpy(&word, text.at, 8), is_hex8(word))) {
    for (int i = 0; i < kHex; ++i) *hash = (*hash ^ text.at[i]) * kPrime;
    text.at += kHex;
    *missing = false;
    return;
  }
  const uint8_t* begin = text.at;
  for (; text.at < text.end && is_hex(*text.at) && text.at - begin < kHex; ++text.at)
    *hash = (*hash ^ *text.at) * kPrime;
  *missing = text.at == begin;
}

template <typename T>
T* data_of(const Tensor& t, ScalarType type, int64_t numel, const char* name) {
  check_type(t, type, name);
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == numel, name, " has ", t.numel(), " elements, not ", numel);
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace

// text: uint8 [bytes], n lines; log1p: fp32 [m], log1p of 0 to m - 1. Fills label uint8 [n] (if labelled), dense fp32
// [n, 13], dense_missing bool [n, 13], sparse int32 [n, 26], values int32 [n, 26] (the bits of uint32) and
// sparse_missing bool [n, 26]. False where a line breaks the format, or where there are not n lines: the outputs are then of no use.
bool parse_criteo(Tensor text, bool labelled, int64_t hash_bins, Tensor log1p, Tensor label, Tensor dense,
                  Tensor dense_missing, Tensor sparse, Tensor values, Tensor sparse_missing) {
  STD_TORCH_CHECK(hash_bins >= 1 && hash_bins <= INT32_MAX, "hash_bins=", hash_bins, " is outside 1 to 2^31 - 1");
  const int64_t n = dense.size(0), small = log1p.numel();
  const uint8_t* begin = data_of<uint8_t>(text, ScalarType::Byte, text.numel(), "text");
  const float* table = data_of<float>(log1p, ScalarType::Float, small, "log1p");
  uint8_t* labels = labelled ? data_of<uint8_t>(label, ScalarType::Byte, n, "label") : nullptr;
  float* numbers = data_of<float>(dense, ScalarType::Float, n * kNumbers, "dense");
  bool* no_number = data_of<bool>(dense_missing, ScalarType::Bool, n * kNumbers, "dense_missing");
  int32_t* ids = data_of<int32_t>(sparse, ScalarType::Int, n * kStrings, "sparse");
  int32_t* hashes = data_of<int32_t>(values, ScalarType::Int, n * kStrings, "values");
  bool* no_string = data_of<bool>(sparse_missing, ScalarType::Bool, n * kStrings, "sparse_missing");
  const uint32_t bins = static_cast<uint32_t>(hash_bins);
  Cursor cursor{begin, begin + text.numel()};
  for (int64_t row = 0; row < n; ++row) {
    if (labelled) {
      if (cursor.at == cursor.end) return false;
      labels[row] = static_cast<uint8_t>(*cursor.at++ - '0');
      if (labels[row] > 1 || !cursor.take('\t')) return false;
    }
    for (int j = 0; j < kNumbers; ++j, ++numbers, ++no_number) {
      int64_t value;
      if (!read_integer(cursor, &value, no_number) || !cursor.take('\t')) return false;
      const int64_t positive = value > 0 ? value : 0;
      *numbers = positive < small ? table[positive] : static_cast<float>(std::log1p(static_cast<double>(positive)));
    }
    for (int j = 0; j < kStrings; ++j, ++ids, ++hashes, ++no_string) {
      uint32_t hash = kBasis ^ (kSalt + static_cast<uint32_t>(j));
      read_string(cursor, &hash, no_string);
      if (!cursor.take(j + 1 < kStrings ? '\t' : '\n')) return false;
      *hashes = static_cast<int32_t>(hash);
      *ids = *no_string ? 0 : static_cast<int32_t>(hash % bins);
    }
  }
  return cursor.at == cursor.end;
}

}  // namespace ctr
