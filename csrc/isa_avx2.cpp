// The kernels with 8 floats a vector.
#define CTR_ISA avx2
#define CTR_WIDTH 8
#define CTR_TABLE kAvx2Kernels
#include "isa.h"
