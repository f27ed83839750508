// The mean of each text's normed rows, one block a text, the mean in registers unless it is very
// long.
#include "cuda/rows.cuh"

namespace gen_fast::cuda {

template <class T, int Width, int Items>
__global__ void __launch_bounds__(most_threads(Items))
    pool_text(const T* hidden, const int32_t* cu_seqlens, const T* norm_weight,
              const float* row_weights, float* out, int64_t size, float eps) {
  typedef Vector<T, Width> V;
  typedef Vector<float, Width> Sums;
  constexpr int Kept = Items ? Items : 1;
  const int32_t begin = cu_seqlens[blockIdx.x], end = cu_seqlens[blockIdx.x + 1];
  out += (int64_t)blockIdx.x * size;
  const auto put = [&](int64_t at, const Sums& sums) {
    // Two 16-byte stores where an element doubles in size.
    constexpr int Quad = Width < 4 ? Width : 4;
#pragma unroll
    for (int j = 0; j < Width; j += Quad) {
      *(Vector<float, Quad>*)(out + at + j) = *(const Vector<float, Quad>*)(sums.element + j);
    }
  };
  // The sums of a row that is too long for registers are kept in the result: a thread reads there
  // only what it has written itself.
  Sums mean[Kept] = {};
  if constexpr (!Items) each_vector<Width, Items>(size, [&](int, int64_t at) { put(at, mean[0]); });
  const auto sums = [&](int i, int64_t at) {
    Sums so_far = mean[i];
    if constexpr (!Items) {
#pragma unroll
      for (int j = 0; j < Width; ++j) so_far.element[j] = out[at + j];
    }
    return so_far;
  };
  for (int32_t r = begin; r < end; ++r) {
    V row[Kept];
    float squares = 0;
    each_vector<Width, Items>(size, [&](int i, int64_t at) {
      row[i] = *(const V*)(hidden + r * size + at);
#pragma unroll
      for (int j = 0; j < Width; ++j) {
        const float value = to_float(row[i].element[j]);
        squares += value * value;
      }
    });
    const float weight = row_weights ? row_weights[r] : 1.0f / (float)(end - begin);
    // The halves take turns, so that no thread overwrites what another still reads.
    const float scale = weight * rsqrtf(reduce<Sum>(squares, r & 1) / (float)size + eps);
    each_vector<Width, Items>(size, [&](int i, int64_t at) {
      const V values = Items ? row[i] : *(const V*)(hidden + r * size + at);
      Sums added = sums(i, at);
#pragma unroll
      for (int j = 0; j < Width; ++j) added.element[j] += scale * to_float(values.element[j]);
      if constexpr (Items) {
        mean[i] = added;
      } else {
        put(at, added);
      }
    });
  }
  const float known = begin < end ? 1.0f : __int_as_float(0x7fc00000);  // 0/0 is NaN
  each_vector<Width, Items>(size, [&](int i, int64_t at) {
    const V w = *(const V*)(norm_weight + at);
    Sums result = sums(i, at);
#pragma unroll
    for (int j = 0; j < Width; ++j) result.element[j] *= known * to_float(w.element[j]);
    put(at, result);
  });
}

template <class T>
static const char* pool_texts(const void* hidden, const int32_t* cu_seqlens,
                              const void* norm_weight, const float* row_weights, float* out,
                              int64_t texts, int64_t size, float eps, Stream stream) {
  const Spread s = spread(size, 16 / sizeof(T));
  const auto run = [&]<int Width, int Items>() {
    return launch(pool_text<T, Width, Items>, (unsigned)texts, s.threads, stream, (const T*)hidden,
                  cu_seqlens, (const T*)norm_weight, row_weights, out, size, eps);
  };
  return s.width == 1 ? with_items<1>(s.items, run) : with_items<16 / sizeof(T)>(s.items, run);
}

const char* pool(Dtype dtype, const void* hidden, const int32_t* cu_seqlens,
                 const void* norm_weight, const float* row_weights, float* out, int64_t texts,
                 int64_t size, float eps, Stream stream) {
  const auto f = dtype == Dtype::f32    ? pool_texts<float>
                 : dtype == Dtype::bf16 ? pool_texts<bf16>
                                        : pool_texts<f16>;
  return f(hidden, cu_seqlens, norm_weight, row_weights, out, texts, size, eps, stream);
}

}  // namespace gen_fast::cuda
