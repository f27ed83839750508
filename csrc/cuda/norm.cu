// Residual add + RMSNorm, one block a row: the row is read once, stays in registers between the
// sum of squares and the scaling unless it is very long, and is written once, quantised if asked.
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
__global__ void __launch_bounds__(most_threads(Items))
    norm_row(const T* x, const T* residual, const T* weight, T* total, void* out, float* scales,
             int64_t size, float eps) {
  typedef Vector<T, Width> V;
  typedef typename Stored<S, T>::type Out;
  const int64_t start = (int64_t)blockIdx.x * size;
  V row[Items ? Items : 1];  // as rounded: the norm is of the stored stream
  float squares = 0;
  each_vector<Width, Items>(size, [&](int i, int64_t at) {
    const V a = *(const V*)(x + start + at), b = *(const V*)(residual + start + at);
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      assign(row[i].element[j], to_float(a.element[j]) + to_float(b.element[j]));
      const float value = to_float(row[i].element[j]);
      squares += value * value;
    }
    *(V*)(total + start + at) = row[i];
  });
  const float scale = rsqrtf(reduce<Sum>(squares, 0) / (float)size + eps);
  const auto normed = [&](int i, int64_t at, const auto& use) {
    // A thread reads of `total` only what it has written itself.
    const V sum = Items ? row[i] : *(const V*)(total + start + at);
    const V w = *(const V*)(weight + at);
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      use(j, to_float(sum.element[j]) * (scale * to_float(w.element[j])));
    }
  };
  float inverse = 1.0f;
  if constexpr (S != Store::plain) {
    float top = 0;
    each_vector<Width, Items>(size, [&](int i, int64_t at) {
      normed(i, at, [&](int, float value) { top = Max::of(top, fabsf(value)); });
    });
    const float step = reduce<Max>(top, 1) / Stored<S, T>::largest;
    if (threadIdx.x == 0) scales[blockIdx.x] = step;
    inverse = step > 0 ? 1.0f / step : 1.0f;
  }
  each_vector<Width, Items>(size, [&](int i, int64_t at) {
    Vector<Out, Width> result;
    normed(i, at, [&](int j, float value) { assign(result.element[j], value * inverse); });
    *(Vector<Out, Width>*)((Out*)out + start + at) = result;
  });
}

template <class T, Store S>
static const char* norm_rows(const void* x, const void* residual, const void* weight, void* total,
                             void* out, float* scales, int64_t rows, int64_t size, float eps,
                             Stream stream) {
  const Spread s = spread(size, 16 / sizeof(T));
  const auto run = [&]<int Width, int Items>() {
    return launch(norm_row<T, S, Width, Items>, (unsigned)rows, s.threads, stream, (const T*)x,
                  (const T*)residual, (const T*)weight, (T*)total, out, scales, size, eps);
  };
  return s.width == 1 ? with_items<1>(s.items, run) : with_items<16 / sizeof(T)>(s.items, run);
}

const char* add_rms_norm(Dtype dtype, Store store, const void* x, const void* residual,
                         const void* weight, void* total, void* out, float* scales, int64_t rows,
                         int64_t size, float eps, Stream stream) {
  const auto by_store = [&]<class T>() {
    const auto f = store == Store::plain  ? norm_rows<T, Store::plain>
                   : store == Store::int8 ? norm_rows<T, Store::int8>
                                          : norm_rows<T, Store::fp8>;
    return f(x, residual, weight, total, out, scales, rows, size, eps, stream);
  };
  switch (dtype) {
    case Dtype::f32: return by_store.operator()<float>();
    case Dtype::bf16: return by_store.operator()<bf16>();
    default: return by_store.operator()<f16>();
  }
}

}  // namespace gen_fast::cuda
