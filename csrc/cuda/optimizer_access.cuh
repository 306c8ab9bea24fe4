// Loads and stores of a block of 256 elements by a warp, of a dtype known when the kernel runs.
//
// A lane has two quads: elements 4 * lane .. + 3 and 128 further on, so that a warp's access of
// either covers consecutive bytes.
#pragma once

#include "vector.cuh"

namespace nf4::cuda {

constexpr int kPerLane = 8;

// A lane's two quads as they lie in memory; 16-bit elements are in x and y.
struct Raw {
  uint4 quad[2];
};

__device__ __forceinline__ Raw load_raw(const void* data, int64_t first, bool wide) {
  Raw raw{};
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const int64_t quad = first / 4 + q * 32;
    if (wide) {
      raw.quad[q] = static_cast<const uint4*>(data)[quad];
    } else {
      const uint2 half = static_cast<const uint2*>(data)[quad];
      raw.quad[q].x = half.x, raw.quad[q].y = half.y;
    }
  }
  return raw;
}

__device__ __forceinline__ void unpack(const Raw& raw, int dtype, float (&v)[kPerLane]) {
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const uint4 w = raw.quad[q];
    float* out = v + 4 * q;
    if (dtype == NF4_FLOAT32) {
      out[0] = __uint_as_float(w.x), out[1] = __uint_as_float(w.y);
      out[2] = __uint_as_float(w.z), out[3] = __uint_as_float(w.w);
    } else if (dtype == NF4_BFLOAT16) {
      unpack2<__nv_bfloat16>(w.x, out[0], out[1]);
      unpack2<__nv_bfloat16>(w.y, out[2], out[3]);
    } else {
      unpack2<__half>(w.x, out[0], out[1]);
      unpack2<__half>(w.y, out[2], out[3]);
    }
  }
}

__device__ __forceinline__ void store_quads(void* data, int64_t first, int dtype,
                                            const float (&v)[kPerLane]) {
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const int64_t quad = first / 4 + q * 32;
    const float* x = v + 4 * q;
    if (dtype == NF4_FLOAT32) {
      static_cast<float4*>(data)[quad] = make_float4(x[0], x[1], x[2], x[3]);
    } else if (dtype == NF4_BFLOAT16) {
      static_cast<uint2*>(data)[quad] =
          make_uint2(pack2<__nv_bfloat16>(x[0], x[1]), pack2<__nv_bfloat16>(x[2], x[3]));
    } else {
      static_cast<uint2*>(data)[quad] =
          make_uint2(pack2<__half>(x[0], x[1]), pack2<__half>(x[2], x[3]));
    }
  }
}

// Element i of a lane, counted from its first.
__device__ __forceinline__ constexpr int place(int i) { return i / 4 * 128 + i % 4; }

__device__ __forceinline__ float load_one(const void* data, int64_t index, int dtype) {
  if (dtype == NF4_FLOAT32) return static_cast<const float*>(data)[index];
  if (dtype == NF4_BFLOAT16) return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
  return to_float(static_cast<const __half*>(data)[index]);
}

__device__ __forceinline__ void store_one(void* data, int64_t index, int dtype, float v) {
  if (dtype == NF4_FLOAT32) {
    static_cast<float*>(data)[index] = v;
  } else if (dtype == NF4_BFLOAT16) {
    static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(v);
  } else {
    static_cast<__half*>(data)[index] = from_float<__half>(v);
  }
}

// A lane's elements of one array, zero past the end where the block is short. Called for short
// blocks and unaligned arrays.
__device__ __forceinline__ void load_each(const void* data, int64_t first, int64_t numel, int dtype,
                                          float (&v)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t index = first + place(i);
    v[i] = index < numel ? load_one(data, index, dtype) : 0.0f;
  }
}

__device__ __forceinline__ void store_each(void* data, int64_t first, int64_t numel, int dtype,
                                           const float (&v)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t index = first + place(i);
    if (index < numel) store_one(data, index, dtype, v[i]);
  }
}

}  // namespace nf4::cuda
