// Residual add + RMSNorm: one pass reads x and residual and writes the sum, a second, from cache,
// writes the normed row. Eager torch reads the sum from memory again.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/norm.cpp"
#include <vector>

#include "common/each_isa.h"
#include "cpu/ops.h"

namespace gen_fast {

void add_rms_norm(Dtype dtype, const void* x, const void* residual, const void* weight,
                  void* total, void* out, int64_t rows, int64_t size, float eps) {
  GEN_FAST_DISPATCH(add_rms_norm)
  (dtype == Dtype::bf16, x, residual, weight, total, out, rows, size, eps);
}

void add_rms_norm_quantized(Dtype dtype, const void* x, const void* residual, const void* weight,
                            void* total, int8_t* out, float* scales, int64_t rows, int64_t size,
                            float eps, bool rotated) {
  GEN_FAST_DISPATCH(add_rms_norm_quantized)
  (dtype == Dtype::bf16, x, residual, weight, total, out, scales, rows, size, eps, rotated);
}

void add_rms_norm_backward(Dtype dtype, const void* grad_normed, const void* grad_total,
                           const void* total, const void* weight, void* out, int64_t rows,
                           int64_t size, float eps) {
  GEN_FAST_DISPATCH(add_rms_norm_backward)
  (dtype == Dtype::bf16, grad_normed, grad_total, total, weight, out, rows, size, eps);
}

}  // namespace gen_fast

#else
#include "common/vector.h"
#include "common/quantize.h"
#include "common/rms.h"

namespace gen_fast::GEN_FAST_ISA {

template <class T, class Out>
static void norm_row(const T* x, const T* residual, const T* weight, T* total, Out* out,
                     int64_t size, float eps) {
  vf squares = {};
  float tail_squares = 0;
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    // The norm is that of the stored stream.
    const vf rounded = store_rounded(total + i, load(x + i) + load(residual + i));
    squares += rounded * rounded;
  }
  for (; i < size; ++i) {
    assign(total + i, to_float(x[i]) + to_float(residual[i]));
    tail_squares += to_float(total[i]) * to_float(total[i]);
  }
  const float scale = 1.0f / std::sqrt((sum(squares) + tail_squares) / (float)size + eps);
  for (i = 0; i + W <= size; i += W) store(out + i, load(total + i) * scale * load(weight + i));
  for (; i < size; ++i) assign(out + i, to_float(total[i]) * scale * to_float(weight[i]));
}

// r·(g·w − s·r²·mean(g·w·s)), plus the stream's own gradient.
template <class T>
static void norm_row_backward(const T* grad_normed, const T* grad_total, const T* total,
                              const T* weight, T* out, int64_t size, float eps) {
  const auto [scale, shared] = rms_gradient(total, grad_normed, weight, size, eps);
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    const vf upstream = load(grad_normed + i) * load(weight + i);
    store(out + i, (upstream - load(total + i) * shared) * scale + load(grad_total + i));
  }
  for (; i < size; ++i) {
    const float upstream = to_float(grad_normed[i]) * to_float(weight[i]);
    assign(out + i, (upstream - to_float(total[i]) * shared) * scale + to_float(grad_total[i]));
  }
}

template <class T>
static void norm_rows(const void* x, const void* residual, const void* weight, void* total,
                      void* out, int64_t rows, int64_t size, float eps) {
  parallel_for(rows, rows_worth_a_thread(size), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin * size; r < end * size; r += size) {
      norm_row((const T*)x + r, (const T*)residual + r, (const T*)weight, (T*)total + r,
               (T*)out + r, size, eps);
    }
  });
}

template <class T>
static void norm_rows_quantized(const void* x, const void* residual, const void* weight,
                                void* total, int8_t* out, float* scales, int64_t rows,
                                int64_t size, float eps, bool rotated) {
  parallel_for(rows, rows_worth_a_thread(size), [&](int64_t begin, int64_t end) {
    std::vector<float> normed(size);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * size;
      norm_row((const T*)x + at, (const T*)residual + at, (const T*)weight, (T*)total + at,
               normed.data(), size, eps);
      scales[r] = finish_row(normed.data(), out + at, size, rotated);
    }
  });
}

template <class T>
static void norm_rows_backward(const void* grad_normed, const void* grad_total,
                               const void* total, const void* weight, void* out, int64_t rows,
                               int64_t size, float eps) {
  parallel_for(rows, rows_worth_a_thread(size), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin * size; r < end * size; r += size) {
      norm_row_backward((const T*)grad_normed + r, (const T*)grad_total + r,
                        (const T*)total + r, (const T*)weight, (T*)out + r, size, eps);
    }
  });
}

static void add_rms_norm(bool is_bf16, const void* x, const void* residual, const void* weight,
                         void* total, void* out, int64_t rows, int64_t size, float eps) {
  (is_bf16 ? norm_rows<bf16> : norm_rows<float>)(x, residual, weight, total, out, rows, size, eps);
}

static void add_rms_norm_quantized(bool is_bf16, const void* x, const void* residual,
                                   const void* weight, void* total, int8_t* out, float* scales,
                                   int64_t rows, int64_t size, float eps, bool rotated) {
  (is_bf16 ? norm_rows_quantized<bf16> : norm_rows_quantized<float>)(
      x, residual, weight, total, out, scales, rows, size, eps, rotated);
}

static void add_rms_norm_backward(bool is_bf16, const void* grad_normed, const void* grad_total,
                                  const void* total, const void* weight, void* out,
                                  int64_t rows, int64_t size, float eps) {
  (is_bf16 ? norm_rows_backward<bf16> : norm_rows_backward<float>)(grad_normed, grad_total, total,
                                                                weight, out, rows, size, eps);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
