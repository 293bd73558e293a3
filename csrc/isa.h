// The kernel table of one instruction set: included by isa_*.cpp after CTR_ISA, CTR_WIDTH and CTR_TABLE are set.
#include "attention_kernel.h"
#include "cross_kernel.h"
#include "ffn_kernel.h"
#include "linear_kernel.h"
#include "sparse_kernel.h"

namespace ctr {

const KernelTable CTR_TABLE = {CTR_ISA::W,
                               CTR_ISA::attention_forward,
                               CTR_ISA::attention_backward,
                               CTR_ISA::ffn_forward,
                               CTR_ISA::ffn_backward,
                               CTR_ISA::linear_forward,
                               CTR_ISA::linear_backward,
                               CTR_ISA::cross_forward,
                               CTR_ISA::cross_backward,
                               CTR_ISA::lookup_rows,
                               CTR_ISA::update_rows};

}  // namespace ctr
