// The kernels that the active instruction set runs.
#include "kernels.h"
#include "simd_level.h"

namespace ctr {

const KernelTable& kernels_for(int64_t width) {
#if defined(__x86_64__)
  const SimdLevel level = simd_level();
  if (level == SimdLevel::avx512 && width % kAvx512Kernels.width == 0) return kAvx512Kernels;
  if (level >= SimdLevel::avx2 && width % kAvx2Kernels.width == 0) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

}  // namespace ctr
