// The kernels with 16 floats a vector.
#define CTR_ISA avx512
#define CTR_WIDTH 16
#define CTR_TABLE kAvx512Kernels
#include "isa.h"
