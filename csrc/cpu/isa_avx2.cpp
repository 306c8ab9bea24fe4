#define NF4_ISA 1  // NF4_ISA_AVX2
#include "table.h"

namespace nf4::cpu {

extern const KernelTable kAvx2;
const KernelTable kAvx2 = make_table("avx2");

}  // namespace nf4::cpu
