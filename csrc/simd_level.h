// The instruction set in use: the best the machine has, unless one is forced.
#pragma once
#include <string>

namespace ctr {

enum class SimdLevel { baseline, avx2, avx512 };

// The active level. First call: CTR_KERNELS_SIMD if set, else the best of this machine.
SimdLevel simd_level();

// Name of the active level after forcing `name` ("" leaves it as it is). Throws std::runtime_error on an
// unknown name, or one this machine cannot run.
std::string select_simd(const std::string& name);

}  // namespace ctr
