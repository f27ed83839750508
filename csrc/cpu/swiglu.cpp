// silu(gate) * up in one pass; eager torch makes two and keeps an intermediate.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/swiglu.cpp"
#include <vector>

#include "common/each_isa.h"
#include "cpu/ops.h"

namespace gen_fast {

void swiglu(Dtype dtype, const void* gate_up, void* out, int64_t rows, int64_t size) {
  GEN_FAST_DISPATCH(swiglu)(dtype == Dtype::bf16, gate_up, out, rows, size);
}

void swiglu_quantized(Dtype dtype, const void* gate_up, int8_t* out, float* scales, int64_t rows,
                      int64_t size, bool rotated) {
  GEN_FAST_DISPATCH(swiglu_quantized)
  (dtype == Dtype::bf16, gate_up, out, scales, rows, size, rotated);
}

void swiglu_backward(Dtype dtype, const void* grad, const void* gate_up, void* out, int64_t rows,
                     int64_t size) {
  GEN_FAST_DISPATCH(swiglu_backward)(dtype == Dtype::bf16, grad, gate_up, out, rows, size);
}

}  // namespace gen_fast

#else
#include "common/vector.h"
#include "common/quantize.h"

namespace gen_fast::GEN_FAST_ISA {

static inline vf sigmoid(vf x) {
  return reciprocal(1.0f + exp2(min(x * -LOG2_E, splat(126.0f))));
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

template <class T, class Out>
static void swiglu_row(const T* gate, const T* up, Out* out, int64_t size) {
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    const vf g = load(gate + i);
    store(out + i, g * sigmoid(g) * load(up + i));
  }
  for (; i < size; ++i) {
    const float g = to_float(gate[i]);
    assign(out + i, g * sigmoid(g) * to_float(up[i]));
  }
}

// silu'(g) = σ(g)·(1 + g·(1 − σ(g)))
template <class T>
static void swiglu_row_backward(const T* grad, const T* gate, const T* up, T* to_gate, T* to_up,
                                int64_t size) {
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    const vf d = load(grad + i), g = load(gate + i), share = sigmoid(g);
    store(to_gate + i, d * load(up + i) * share * (1.0f + g * (1.0f - share)));
    store(to_up + i, d * g * share);
  }
  for (; i < size; ++i) {
    const float d = to_float(grad[i]), g = to_float(gate[i]), share = sigmoid(g);
    assign(to_gate + i, d * to_float(up[i]) * share * (1.0f + g * (1.0f - share)));
    assign(to_up + i, d * g * share);
  }
}

template <class T>
static void swiglu_rows(const void* gate_up, void* out, int64_t rows, int64_t size) {
  parallel_for(rows, rows_worth_a_thread(size), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* gate = (const T*)gate_up + r * 2 * size;
      swiglu_row(gate, gate + size, (T*)out + r * size, size);
    }
  });
}

template <class T>
static void swiglu_rows_quantized(const void* gate_up, int8_t* out, float* scales, int64_t rows,
                                  int64_t size, bool rotated) {
  parallel_for(rows, rows_worth_a_thread(size), [&](int64_t begin, int64_t end) {
    std::vector<float> result(size);
    for (int64_t r = begin; r < end; ++r) {
      const T* gate = (const T*)gate_up + r * 2 * size;
      swiglu_row(gate, gate + size, result.data(), size);
      scales[r] = finish_row(result.data(), out + r * size, size, rotated);
    }
  });
}

template <class T>
static void swiglu_rows_backward(const void* grad, const void* gate_up, void* out, int64_t rows,
                                 int64_t size) {
  parallel_for(rows, rows_worth_a_thread(size), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* gate = (const T*)gate_up + r * 2 * size;
      T* to_gate = (T*)out + r * 2 * size;
      swiglu_row_backward((const T*)grad + r * size, gate, gate + size, to_gate, to_gate + size,
                          size);
    }
  });
}

static void swiglu(bool is_bf16, const void* gate_up, void* out, int64_t rows, int64_t size) {
  (is_bf16 ? swiglu_rows<bf16> : swiglu_rows<float>)(gate_up, out, rows, size);
}

static void swiglu_quantized(bool is_bf16, const void* gate_up, int8_t* out, float* scales,
                             int64_t rows, int64_t size, bool rotated) {
  (is_bf16 ? swiglu_rows_quantized<bf16> : swiglu_rows_quantized<float>)(gate_up, out, scales, rows,
                                                                      size, rotated);
}

static void swiglu_backward(bool is_bf16, const void* grad, const void* gate_up, void* out,
                            int64_t rows, int64_t size) {
  (is_bf16 ? swiglu_rows_backward<bf16> : swiglu_rows_backward<float>)(grad, gate_up, out, rows,
                                                                    size);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
