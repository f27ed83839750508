// Per-head RMSNorm and rotation, in place if asked: each element is read and written once.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/rope.cpp"
#include <vector>

#include "cpu/ops.h"
#include "common/each_isa.h"

namespace gen_fast {

void rope(Dtype dtype, const RopeArguments& arguments) {
  GEN_FAST_DISPATCH(rope)(dtype == Dtype::bf16, arguments);
}

void rope_backward(Dtype dtype, const RopeArguments& arguments) {
  GEN_FAST_DISPATCH(rope_backward)(dtype == Dtype::bf16, arguments);
}

}  // namespace gen_fast

#else
#include "common/vector.h"
#include "common/rms.h"

namespace gen_fast::GEN_FAST_ISA {

template <class T>
static void rope_head(const T* x, T* out, const float* cos, const float* sin, const T* norm,
                      int64_t size, float eps) {
  const int64_t half = size / 2;
  const float scale = norm ? inverse_rms(x, size, eps) : 1.0f;
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    vf a = load(x + i) * scale, b = load(x + half + i) * scale;
    if (norm) a *= load(norm + i), b *= load(norm + half + i);
    const vf c = load(cos + i), s = load(sin + i);
    store(out + i, a * c - b * s);
    store(out + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    float a = to_float(x[i]) * scale, b = to_float(x[half + i]) * scale;
    if (norm) a *= to_float(norm[i]), b *= to_float(norm[half + i]);
    assign(out + i, a * cos[i] - b * sin[i]);
    assign(out + half + i, b * cos[i] + a * sin[i]);
  }
}

// Rotates the gradient back; with a norm, `turned` [size] holds the result before the norm's own.
template <class T>
static void rope_head_backward(const T* grad, const T* x, T* out, const float* cos,
                               const float* sin, const T* norm, float* turned, int64_t size,
                               float eps) {
  const int64_t half = size / 2;
  vf products = {};
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const vf a = load(grad + i), b = load(grad + half + i);
    const vf c = load(cos + i), s = load(sin + i);
    vf first = a * c + b * s, second = b * c - a * s;
    if (!norm) {
      store(out + i, first);
      store(out + half + i, second);
      continue;
    }
    first *= load(norm + i);
    second *= load(norm + half + i);
    store(turned + i, first);
    store(turned + half + i, second);
    products += first * load(x + i) + second * load(x + half + i);
  }
  float product = sum(products);
  for (; i < half; ++i) {
    const float a = to_float(grad[i]), b = to_float(grad[half + i]);
    float first = a * cos[i] + b * sin[i], second = b * cos[i] - a * sin[i];
    if (!norm) {
      assign(out + i, first);
      assign(out + half + i, second);
      continue;
    }
    turned[i] = first *= to_float(norm[i]);
    turned[half + i] = second *= to_float(norm[half + i]);
    product += first * to_float(x[i]) + second * to_float(x[half + i]);
  }
  if (!norm) return;
  const float scale = inverse_rms(x, size, eps);
  const float shared = scale * scale * product / (float)size;
  for (i = 0; i + W <= size; i += W)
    store(out + i, scale * (load(turned + i) - load(x + i) * shared));
  for (; i < size; ++i) assign(out + i, scale * (turned[i] - to_float(x[i]) * shared));
}

template <class T>
static void rope_rows(const RopeArguments& a) {
  parallel_for(a.rows, rows_worth_a_thread(a.heads * a.size), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float *cos = a.cos + r * (a.size / 2), *sin = a.sin + r * (a.size / 2);
      for (int64_t h = 0; h < a.heads; ++h) {
        rope_head((const T*)a.x + r * a.x_stride + h * a.size,
                  (T*)a.out + r * a.out_stride + h * a.size, cos, sin,
                  a.norm ? (const T*)a.norm + h * a.size : nullptr, a.size, a.eps);
      }
    }
  });
}

template <class T>
static void rope_rows_backward(const RopeArguments& a) {
  parallel_for(a.rows, rows_worth_a_thread(a.heads * a.size), [&](int64_t begin, int64_t end) {
    std::vector<float> turned(a.size);
    for (int64_t r = begin; r < end; ++r) {
      const float *cos = a.cos + r * (a.size / 2), *sin = a.sin + r * (a.size / 2);
      for (int64_t h = 0; h < a.heads; ++h) {
        rope_head_backward((const T*)a.grad + r * a.grad_stride + h * a.size,
                           (const T*)a.x + r * a.x_stride + h * a.size,
                           (T*)a.out + r * a.out_stride + h * a.size, cos, sin,
                           a.norm ? (const T*)a.norm + h * a.size : nullptr, turned.data(),
                           a.size, a.eps);
      }
    }
  });
}

static void rope(bool is_bf16, const RopeArguments& arguments) {
  (is_bf16 ? rope_rows<bf16> : rope_rows<float>)(arguments);
}

static void rope_backward(bool is_bf16, const RopeArguments& arguments) {
  (is_bf16 ? rope_rows_backward<bf16> : rope_rows_backward<float>)(arguments);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
