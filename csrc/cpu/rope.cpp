// Per-head RMSNorm and rotation in place: each element is read and written once.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/rope.cpp"
#include "common/each_isa.h"
#include "cpu/ops.h"

namespace gen_fast {

void rope(Dtype dtype, void* x, int64_t stride, const float* cos, const float* sin,
          const void* norm, int64_t rows, int64_t heads, int64_t size, float eps) {
  GEN_FAST_DISPATCH(rope)
  (dtype == Dtype::bf16, x, stride, cos, sin, norm, rows, heads, size, eps);
}

}  // namespace gen_fast

#else
#include "common/vector.h"

namespace gen_fast::GEN_FAST_ISA {

template <class T>
static void rope_head(T* x, const float* cos, const float* sin, const T* norm, int64_t size,
                      float eps) {
  const int64_t half = size / 2;
  float scale = 1.0f;
  if (norm) {
    vf squares = {};
    float tail = 0;
    int64_t i = 0;
    for (; i + W <= size; i += W) {
      vf v = load(x + i);
      squares += v * v;
    }
    for (; i < size; ++i) tail += to_float(x[i]) * to_float(x[i]);
    scale = 1.0f / std::sqrt((sum(squares) + tail) / (float)size + eps);
  }
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    vf a = load(x + i) * scale, b = load(x + half + i) * scale;
    if (norm) a *= load(norm + i), b *= load(norm + half + i);
    vf c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    float a = to_float(x[i]) * scale, b = to_float(x[half + i]) * scale;
    if (norm) a *= to_float(norm[i]), b *= to_float(norm[half + i]);
    assign(x + i, a * cos[i] - b * sin[i]);
    assign(x + half + i, b * cos[i] + a * sin[i]);
  }
}

template <class T>
static void rope_rows(void* x, int64_t stride, const float* cos, const float* sin,
                      const void* norm, int64_t rows, int64_t heads, int64_t size, float eps) {
  parallel_for(rows, 16384 / (heads * size + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t h = 0; h < heads; ++h) {
        rope_head((T*)x + r * stride + h * size, cos + r * (size / 2), sin + r * (size / 2),
                  norm ? (const T*)norm + h * size : nullptr, size, eps);
      }
    }
  });
}

static void rope(bool half, void* x, int64_t stride, const float* cos, const float* sin,
                 const void* norm, int64_t rows, int64_t heads, int64_t size, float eps) {
  (half ? rope_rows<bf16> : rope_rows<float>)(x, stride, cos, sin, norm, rows, heads, size, eps);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
