// Floats in memory that begins at a cache line: loads of whole vectors that straddle two lines take twice as long.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace ctr {

class AlignedFloats {
 public:
  AlignedFloats() = default;
  explicit AlignedFloats(int64_t count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, count * sizeof(float)) != 0) throw std::bad_alloc();
    data_.reset(static_cast<float*>(memory));
  }
  static AlignedFloats zeros(int64_t count) {
    AlignedFloats floats(count);
    for (int64_t i = 0; i < count; ++i) floats[i] = 0.0f;
    return floats;
  }
  float* data() const { return data_.get(); }
  float& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> data_;
};

}  // namespace ctr
