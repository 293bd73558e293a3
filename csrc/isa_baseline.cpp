// The kernels with 4 floats a vector: any x86-64, NEON, or what else the compiler targets.
#define CTR_ISA baseline
#define CTR_WIDTH 4
#define CTR_TABLE kBaselineKernels
#include "isa.h"
