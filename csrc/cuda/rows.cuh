// What the row kernels share: 16-byte accesses, conversions, and reductions over a block.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

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

// How a row is spread over a block: `items` vectors of `width` elements a thread, which it keeps in
// registers; 0 items for a longer row, whose vectors it takes from memory each time.
struct Spread {
  int width, items, threads;
};

// The most threads of a block with so many items. Kernels are compiled for it (__launch_bounds__):
// else they may take more registers a thread than a block of that size has.
constexpr int most_threads(int items) { return items == 0 ? 1024 : items == 4 ? 512 : 256; }

// Up to 16,384 bf16 elements are kept in registers.
inline Spread spread(int64_t size, int64_t aligned_width) {
  const int64_t width = size % aligned_width == 0 ? aligned_width : 1;
  const int64_t vectors = (size + width - 1) / width;
  for (int items = 1; items <= 4; items *= 2) {
    const int64_t threads = ((vectors + items - 1) / items + 31) / 32 * 32;
    if (threads <= most_threads(items)) return {(int)width, items, (int)threads};
  }
  return {(int)width, 0, most_threads(0)};
}

// Calls f(i, at) for each vector of the thread: its i-th, which begins at element `at`.
template <int Width, int Items, class F>
__device__ inline void each_vector(int64_t size, const F& f) {
  if constexpr (Items) {
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int64_t at = ((int64_t)i * blockDim.x + threadIdx.x) * Width;
      if (at < size) f(i, at);
    }
  } else {
    for (int64_t at = (int64_t)threadIdx.x * Width; at < size; at += (int64_t)blockDim.x * Width) {
      f(0, at);
    }
  }
}

// f with <width, items> as compile-time constants.
template <int Width, class F>
inline const char* with_items(int items, const F& f) {
  switch (items) {
    case 1: return f.template operator()<Width, 1>();
    case 2: return f.template operator()<Width, 2>();
    case 4: return f.template operator()<Width, 4>();
    default: return f.template operator()<Width, 0>();
  }
}

}  // namespace gen_fast::cuda
