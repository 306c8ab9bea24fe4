// Element types: conversion to and from float, and 16-byte accesses of eight elements.
#pragma once

#include "api.h"
#include "ptx.cuh"

namespace nf4::cuda {

template <typename T>
__device__ __forceinline__ float to_float(T v) {
  return static_cast<float>(v);
}

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <typename T>
__device__ __forceinline__ uint32_t bits16(T v) {
  static_assert(sizeof(T) == 2);
  return *reinterpret_cast<const uint16_t*>(&v);
}

// Two elements in one register, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T>
__device__ __forceinline__ void unpack2(uint32_t pair, float& first, float& second);
template <>
__device__ __forceinline__ void unpack2<__half>(uint32_t pair, float& first, float& second) {
  const __half2 h = *reinterpret_cast<const __half2*>(&pair);
  first = __low2float(h);
  second = __high2float(h);
}
template <>
__device__ __forceinline__ void unpack2<__nv_bfloat16>(uint32_t pair, float& first, float& second) {
  first = __uint_as_float(pair << 16);
  second = __uint_as_float(pair & 0xffff0000u);
}

// Eight consecutive elements from a 16-byte aligned address.
template <typename T>
__device__ __forceinline__ void load8(const T* p, float (&v)[8]) {
  if constexpr (sizeof(T) == 4) {
    const float4 a = reinterpret_cast<const float4*>(p)[0];
    const float4 b = reinterpret_cast<const float4*>(p)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  } else {
    const uint4 a = *reinterpret_cast<const uint4*>(p);
    unpack2<T>(a.x, v[0], v[1]);
    unpack2<T>(a.y, v[2], v[3]);
    unpack2<T>(a.z, v[4], v[5]);
    unpack2<T>(a.w, v[6], v[7]);
  }
}

template <typename T>
__device__ __forceinline__ void store8(T* p, const float (&v)[8]) {
  if constexpr (sizeof(T) == 4) {
    reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    *reinterpret_cast<uint4*>(p) = make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]),
                                              pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7]));
  }
}

// 16 bytes of elements, which this kernel does not read again.
template <typename T, int kCount>
__device__ __forceinline__ void stream16(T* p, const float (&v)[kCount]) {
  static_assert(kCount * sizeof(T) == 16);
  if constexpr (sizeof(T) == 4) {
    __stcs(reinterpret_cast<float4*>(p), make_float4(v[0], v[1], v[2], v[3]));
  } else {
    __stcs(reinterpret_cast<uint4*>(p), make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]),
                                                   pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7])));
  }
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls `body(T())` for the element type that `dtype` names.
template <typename Body>
int with_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case NF4_FLOAT32:
      return body(float());
    case NF4_FLOAT16:
      return body(__half());
    case NF4_BFLOAT16:
      return body(__nv_bfloat16());
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace nf4::cuda
