// Chooses the instruction set when the library is first used; see simd_level.h.
#include "simd_level.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace ctr {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

SimdLevel best_of_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return SimdLevel::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return SimdLevel::avx2;
#endif
  return SimdLevel::baseline;
}

SimdLevel parse(const std::string& name) {
  const SimdLevel best = best_of_machine();
  for (int i = 0; i < 3; ++i) {
    if (name != kNames[i]) continue;
    if (i > static_cast<int>(best))
      throw std::runtime_error("CTR_KERNELS_SIMD=" + name + ": this machine has only " +
                               kNames[static_cast<int>(best)]);
    return static_cast<SimdLevel>(i);
  }
  throw std::runtime_error("CTR_KERNELS_SIMD=" + name + ": choose avx512, avx2 or baseline");
}

std::atomic<int> active{-1};

}  // namespace

SimdLevel simd_level() {
  int level = active.load(std::memory_order_relaxed);
  if (level < 0) {
    const char* forced = std::getenv("CTR_KERNELS_SIMD");
    level = static_cast<int>(forced && *forced ? parse(forced) : best_of_machine());
    active.store(level, std::memory_order_relaxed);
  }
  return static_cast<SimdLevel>(level);
}

std::string select_simd(const std::string& name) {
  if (!name.empty()) active.store(static_cast<int>(parse(name)), std::memory_order_relaxed);
  return kNames[static_cast<int>(simd_level())];
}

}  // namespace ctr
