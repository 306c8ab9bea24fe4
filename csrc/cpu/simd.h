// The vector operations of the instruction set that this translation unit is compiled for.
#pragma once

#define NF4_ISA_PORTABLE 0
#define NF4_ISA_AVX2 1
#define NF4_ISA_AVX512 2
#define NF4_ISA_AVX512_BF16 3

#if NF4_ISA >= NF4_ISA_AVX512
#include "simd_avx512.h"
#elif NF4_ISA == NF4_ISA_AVX2
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif
