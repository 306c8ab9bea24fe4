#define NF4_ISA 0  // NF4_ISA_PORTABLE
#include "table.h"

namespace nf4::cpu {

extern const KernelTable kPortable;
const KernelTable kPortable = make_table("portable");

}  // namespace nf4::cpu
