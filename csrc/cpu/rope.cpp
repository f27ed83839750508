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

constexpr int64_t AHEAD = 4096;  // bytes that are asked for before they are needed

template <class T>
static inline void prefetch(const T* head, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / sizeof(T)) {
    __builtin_prefetch((const char*)(head + i) + AHEAD);
  }
}

// Calls body with the size of a head; with the usual ones as constants: loops of a known length leave
// the processor to look further ahead, which memory waits for.
template <class Body>
static inline void with_size(int64_t size, const Body& body) {
  switch (size) {
    case 64: return body(std::integral_constant<int64_t, 64>());
    case 128: return body(std::integral_constant<int64_t, 128>());
    default: return body(size);
  }
}

template <bool has_norm, class T, class Size>
static inline INLINE void rope_head(const T* x, T* out, const float* cos, const float* sin,
                                    const T* norm, Size size, float eps) {
  const int64_t half = size / 2;
  prefetch(x, size);
  const float scale = has_norm ? inverse_rms(x, size, eps) : 1.0f;
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    vf a = load(x + i) * scale, b = load(x + half + i) * scale;
    if (has_norm) a *= load(norm + i), b *= load(norm + half + i);
    const vf c = load(cos + i), s = load(sin + i);
    store(out + i, a * c - b * s);
    store(out + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    float a = to_float(x[i]) * scale, b = to_float(x[half + i]) * scale;
    if (has_norm) a *= to_float(norm[i]), b *= to_float(norm[half + i]);
    assign(out + i, a * cos[i] - b * sin[i]);
    assign(out + half + i, b * cos[i] + a * sin[i]);
  }
}

// Rotates the gradient back; with a norm, `turned` [size] holds the result before the norm's own.
template <bool has_norm, class T, class Size>
static inline INLINE void rope_head_backward(const T* grad, const T* x, T* out, const float* cos,
                                             const float* sin, const T* norm, float* turned,
                                             Size size, float eps) {
  const int64_t half = size / 2;
  prefetch(grad, size);
  vf products = {};
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const vf a = load(grad + i), b = load(grad + half + i);
    const vf c = load(cos + i), s = load(sin + i);
    vf first = a * c + b * s, second = b * c - a * s;
    if (!has_norm) {
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
    if (!has_norm) {
      assign(out + i, first);
      assign(out + half + i, second);
      continue;
    }
    turned[i] = first *= to_float(norm[i]);
    turned[half + i] = second *= to_float(norm[half + i]);
    product += first * to_float(x[i]) + second * to_float(x[half + i]);
  }
  if (!has_norm) return;
  prefetch(x, size);
  const float scale = inverse_rms(x, size, eps);
  const float shared = scale * scale * product / (float)size;
  for (i = 0; i + W <= size; i += W)
    store(out + i, scale * (load(turned + i) - load(x + i) * shared));
  for (; i < size; ++i) assign(out + i, scale * (turned[i] - to_float(x[i]) * shared));
}

template <class T, bool has_norm>
static void rope_rows(const RopeArguments& arguments) {
  parallel_for(
      arguments.rows, rows_worth_a_thread(arguments.heads * arguments.size),
      [&](int64_t begin, int64_t end) {
        // A copy: a store might change what a reference leads to, as far as the compiler knows.
        const RopeArguments a = arguments;
        with_size(a.size, [&](auto size) {
          for (int64_t r = begin; r < end; ++r) {
            const float *cos = a.cos + r * (size / 2), *sin = a.sin + r * (size / 2);
            const T* x = (const T*)a.x + r * a.x_stride;
            T* out = (T*)a.out + r * a.out_stride;
            for (int64_t h = 0; h < a.heads; ++h) {
              rope_head<has_norm>(x + h * size, out + h * size, cos, sin,
                                  has_norm ? (const T*)a.norm + h * size : nullptr, size, a.eps);
            }
          }
        });
      });
}

template <class T, bool has_norm>
static void rope_rows_backward(const RopeArguments& arguments) {
  parallel_for(
      arguments.rows, rows_worth_a_thread(arguments.heads * arguments.size),
      [&](int64_t begin, int64_t end) {
        const RopeArguments a = arguments;
        std::vector<float> turned(has_norm ? a.size : 0);
        with_size(a.size, [&](auto size) {
          for (int64_t r = begin; r < end; ++r) {
            const float *cos = a.cos + r * (size / 2), *sin = a.sin + r * (size / 2);
            const T* grad = (const T*)a.grad + r * a.grad_stride;
            const T* x = has_norm ? (const T*)a.x + r * a.x_stride : nullptr;
            T* out = (T*)a.out + r * a.out_stride;
            for (int64_t h = 0; h < a.heads; ++h) {
              rope_head_backward<has_norm>(
                  grad + h * size, has_norm ? x + h * size : nullptr, out + h * size, cos, sin,
                  has_norm ? (const T*)a.norm + h * size : nullptr, turned.data(), size, a.eps);
            }
          }
        });
      });
}

static void rope(bool is_bf16, const RopeArguments& arguments) {
  if (arguments.norm) return (is_bf16 ? rope_rows<bf16, true> : rope_rows<float, true>)(arguments);
  (is_bf16 ? rope_rows<bf16, false> : rope_rows<float, false>)(arguments);
}

static void rope_backward(bool is_bf16, const RopeArguments& arguments) {
  if (arguments.norm) {
    return (is_bf16 ? rope_rows_backward<bf16, true> : rope_rows_backward<float, true>)(arguments);
  }
  (is_bf16 ? rope_rows_backward<bf16, false> : rope_rows_backward<float, false>)(arguments);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
