#define NF4_ISA 3  // NF4_ISA_AVX512_BF16
#include "table.h"

namespace nf4::cpu {

extern const KernelTable kAvx512Bf16;
const KernelTable kAvx512Bf16 = make_table("avx512_bf16");

}  // namespace nf4::cpu
