// What the row kernels share: 16-byte accesses, conversions, and reductions over a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace gen_fast::cuda {

typedef __nv_bfloat16 bf16;
typedef __half f16;

// N elements moved as one access; N · sizeof(T) is 16 bytes wherever the rows are aligned.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T element[N];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }

__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(bf16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ inline void assign(f16& to, float x) { to = __float2half_rn(x); }
__device__ inline void assign(int8_t& to, float x) { to = (int8_t)__float2int_rn(x); }
__device__ inline void assign(__nv_fp8_e4m3& to, float x) { to = __nv_fp8_e4m3(x); }

struct Sum {
  __device__ static float of(float a, float b) { return a + b; }
};

// The larger of two numbers that are not negative, or NaN, which fmaxf drops. As bits they have the
// order of the numbers, with NaN above infinity.
struct Max {
  __device__ static float of(float a, float b) {
    return __int_as_float(max(__float_as_int(a), __float_as_int(b)));
  }
};

// The reduction of `value` over the block, on every thread; 0 is neutral for what is reduced here.
// Two consecutive calls need no barrier between them: they use the two halves of the buffer.
template <class Op>
__device__ inline float reduce(float value, int half) {
  __shared__ float partial[2][32];
  for (int step = 16; step; step /= 2) {
    value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  const int warps = blockDim.x / 32;
  if (warps == 1) return value;
  if (threadIdx.x % 32 == 0) partial[half][threadIdx.x / 32] = value;
  __syncthreads();
  value = (int)(threadIdx.x % 32) < warps ? partial[half][threadIdx.x % 32] : 0.0f;
  for (int step = 16; step; step /= 2) {
    value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  return value;
}

// How a row of `size` elements is spread over a block: `items` vectors of `width` a thread.
struct Spread {
  int width, items, threads;
};

// At most 8 vectors a thread, so that a row stays in registers: up to 65,536 bf16 elements.
inline bool spread(int64_t size, int64_t aligned_width, Spread* out) {
  out->width = size % aligned_width == 0 ? (int)aligned_width : 1;
  const int64_t vectors = (size + out->width - 1) / out->width;
  for (out->items = 1; out->items <= 8; out->items *= 2) {
    const int64_t threads = (vectors + out->items - 1) / out->items;
    // More than 256 threads only where fewer would need more than four vectors each.
    if (threads <= (out->items < 4 ? 256 : 1024)) {
      out->threads = (int)((threads + 31) / 32 * 32);
      return true;
    }
  }
  return false;
}

// Calls f with <width, items> as compile-time constants.
template <int Width, class F>
inline void with_items(int items, const F& f) {
  switch (items) {
    case 1: return f.template operator()<Width, 1>();
    case 2: return f.template operator()<Width, 2>();
    case 4: return f.template operator()<Width, 4>();
    default: return f.template operator()<Width, 8>();
  }
}

}  // namespace gen_fast::cuda
