#define NF4_ISA 2  // NF4_ISA_AVX512
#include "table.h"

namespace nf4::cpu {

extern const KernelTable kAvx512;
const KernelTable kAvx512 = make_table("avx512");

}  // namespace nf4::cpu
