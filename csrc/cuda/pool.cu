// The mean of each text's normed rows, one block a text, the mean in registers.
#include "cuda/ops.h"
#include "cuda/rows.cuh"

namespace gen_fast::cuda {

template <class T, int Width, int Items>
__global__ void pool_text(const T* hidden, const int32_t* offsets, const T* norm_weight,
                          const float* row_weights, float* out, int64_t size, float eps) {
  typedef Vector<T, Width> V;
  const int32_t begin = offsets[blockIdx.x], end = offsets[blockIdx.x + 1];
  float mean[Items][Width] = {};
  for (int32_t r = begin; r < end; ++r) {
    V row[Items];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int64_t at = ((int64_t)i * blockDim.x + threadIdx.x) * Width;
      if (at >= size) continue;
      row[i] = *(const V*)(hidden + r * size + at);
#pragma unroll
      for (int j = 0; j < Width; ++j) {
        const float value = to_float(row[i].element[j]);
        squares += value * value;
      }
    }
    const float weight = row_weights ? row_weights[r] : 1.0f / (float)(end - begin);
    // The halves take turns, so that no thread overwrites what another still reads.
    const float scale = weight * rsqrtf(reduce<Sum>(squares, r & 1) / (float)size + eps);
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int64_t at = ((int64_t)i * blockDim.x + threadIdx.x) * Width;
      if (at >= size) continue;
#pragma unroll
      for (int j = 0; j < Width; ++j) mean[i][j] += scale * to_float(row[i].element[j]);
    }
  }
  const float known = begin < end ? 1.0f : __int_as_float(0x7fc00000);  // 0/0 is NaN
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int64_t at = ((int64_t)i * blockDim.x + threadIdx.x) * Width;
    if (at >= size) continue;
    const V w = *(const V*)(norm_weight + at);
    Vector<float, Width> result;
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      result.element[j] = known * mean[i][j] * to_float(w.element[j]);
    }
    // Two 16-byte stores where an element doubles in size.
    float* to = out + (int64_t)blockIdx.x * size + at;
    constexpr int Quad = Width < 4 ? Width : 4;
#pragma unroll
    for (int j = 0; j < Width; j += Quad) {
      *(Vector<float, Quad>*)(to + j) = *(Vector<float, Quad>*)(result.element + j);
    }
  }
}

template <class T>
static const char* launch(const void* hidden, const int32_t* offsets, const void* norm_weight,
                          const float* row_weights, float* out, int64_t texts, int64_t size,
                          float eps, Stream stream) {
  Spread s;
  if (!spread(size, 16 / sizeof(T), &s)) return "rows are too long";
  const auto run = [&]<int Width, int Items>() {
    pool_text<T, Width, Items><<<(unsigned)texts, s.threads, 0, (cudaStream_t)stream>>>(
        (const T*)hidden, offsets, (const T*)norm_weight, row_weights, out, size, eps);
  };
  if (s.width == 1) {
    with_items<1>(s.items, run);
  } else {
    with_items<16 / sizeof(T)>(s.items, run);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* pool(Dtype dtype, const void* hidden, const int32_t* offsets, const void* norm_weight,
                 const float* row_weights, float* out, int64_t texts, int64_t size, float eps,
                 Stream stream) {
  const auto f = dtype == Dtype::f32    ? launch<float>
                 : dtype == Dtype::bf16 ? launch<bf16>
                                        : launch<f16>;
  return f(hidden, offsets, norm_weight, row_weights, out, texts, size, eps, stream);
}

}  // namespace gen_fast::cuda
