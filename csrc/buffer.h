// Scratch of the kernels: cache-line aligned floats on the heap.
#pragma once
#include <cstdlib>
#include <new>

namespace ctr {
namespace CTR_ISA {

class Buffer {
 public:
  explicit Buffer(int64_t count) {
    if (posix_memalign(reinterpret_cast<void**>(&data_), 64, count * sizeof(float)) != 0) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return data_; }

 private:
  float* data_ = nullptr;
};

}  // namespace CTR_ISA
}  // namespace ctr
