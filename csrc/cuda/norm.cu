// Residual add + RMSNorm, one block a row: the row is read once, stays in registers between the
// sum of squares and the scaling, and is written once, quantised if asked.
#include "cuda/ops.h"
#include "cuda/rows.cuh"

namespace gen_fast::cuda {

template <Store S, class T>
struct Stored {
  typedef T type;
};
template <class T>
struct Stored<Store::int8, T> {
  typedef int8_t type;
  static constexpr float largest = 127.0f;
};
template <class T>
struct Stored<Store::fp8, T> {
  typedef __nv_fp8_e4m3 type;
  static constexpr float largest = 448.0f;
};

template <class T, Store S, int Width, int Items>
__global__ void norm_row(const T* x, const T* residual, const T* weight, T* total, void* out,
                         float* scales, int64_t size, float eps) {
  typedef Vector<T, Width> V;
  typedef typename Stored<S, T>::type Out;
  const int64_t start = (int64_t)blockIdx.x * size;
  float row[Items][Width];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int64_t at = ((int64_t)i * blockDim.x + threadIdx.x) * Width;
    if (at >= size) continue;
    const V a = *(const V*)(x + start + at), b = *(const V*)(residual + start + at);
    V sum;
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      assign(sum.element[j], to_float(a.element[j]) + to_float(b.element[j]));
      row[i][j] = to_float(sum.element[j]);  // as rounded: the norm is of the stored stream
      squares += row[i][j] * row[i][j];
    }
    *(V*)(total + start + at) = sum;
  }
  const float scale = rsqrtf(reduce<Sum>(squares, 0) / (float)size + eps);
  float top = 0;
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int64_t at = ((int64_t)i * blockDim.x + threadIdx.x) * Width;
    if (at >= size) continue;
    const V w = *(const V*)(weight + at);
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      row[i][j] *= scale * to_float(w.element[j]);
      top = Max::of(top, fabsf(row[i][j]));
    }
  }
  float inverse = 1.0f;
  if constexpr (S != Store::plain) {
    const float step = reduce<Max>(top, 1) / Stored<S, T>::largest;
    if (threadIdx.x == 0) scales[blockIdx.x] = step;
    inverse = step > 0 ? 1.0f / step : 1.0f;
  }
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int64_t at = ((int64_t)i * blockDim.x + threadIdx.x) * Width;
    if (at >= size) continue;
    Vector<Out, Width> result;
#pragma unroll
    for (int j = 0; j < Width; ++j) assign(result.element[j], row[i][j] * inverse);
    *(Vector<Out, Width>*)((Out*)out + start + at) = result;
  }
}

template <class T, Store S>
static const char* launch(const void* x, const void* residual, const void* weight, void* total,
                          void* out, float* scales, int64_t rows, int64_t size, float eps,
                          Stream stream) {
  Spread s;
  if (!spread(size, 16 / sizeof(T), &s)) return "rows are too long";
  const auto run = [&]<int Width, int Items>() {
    norm_row<T, S, Width, Items><<<(unsigned)rows, s.threads, 0, (cudaStream_t)stream>>>(
        (const T*)x, (const T*)residual, (const T*)weight, (T*)total, out, scales, size, eps);
  };
  if (s.width == 1) {
    with_items<1>(s.items, run);
  } else {
    with_items<16 / sizeof(T)>(s.items, run);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* add_rms_norm(Dtype dtype, Store store, const void* x, const void* residual,
                         const void* weight, void* total, void* out, float* scales, int64_t rows,
                         int64_t size, float eps, Stream stream) {
  const auto by_store = [&]<class T>() {
    const auto f = store == Store::plain  ? launch<T, Store::plain>
                   : store == Store::int8 ? launch<T, Store::int8>
                                          : launch<T, Store::fp8>;
    return f(x, residual, weight, total, out, scales, rows, size, eps, stream);
  };
  switch (dtype) {
    case Dtype::f32: return by_store.operator()<float>();
    case Dtype::bf16: return by_store.operator()<bf16>();
    default: return by_store.operator()<f16>();
  }
}

}  // namespace gen_fast::cuda
