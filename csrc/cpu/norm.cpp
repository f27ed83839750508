// Residual add + RMSNorm: one pass reads x and residual and writes the sum, a second, from cache,
// writes the normed row. Eager torch makes five.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/norm.cpp"
#include "common/each_isa.h"
#include "cpu/ops.h"

namespace gen_fast {

void add_rms_norm(Dtype dtype, const void* x, void* residual, const void* weight, void* out,
                  int64_t rows, int64_t size, float eps) {
  GEN_FAST_DISPATCH(add_rms_norm)
  (dtype == Dtype::bf16, x, residual, weight, out, rows, size, eps);
}

}  // namespace gen_fast

#else
#include "common/vector.h"

namespace gen_fast::GEN_FAST_ISA {

template <class T>
static void norm_row(const T* x, T* residual, const T* weight, T* out, int64_t size, float eps) {
  vf squares = {};
  float tail_squares = 0;
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    vf total = load(x + i) + load(residual + i);
    store(residual + i, total);
    total = load(residual + i);  // as rounded: the norm is that of the stored stream
    squares += total * total;
  }
  for (; i < size; ++i) {
    assign(residual + i, to_float(x[i]) + to_float(residual[i]));
    tail_squares += to_float(residual[i]) * to_float(residual[i]);
  }
  const float scale = 1.0f / std::sqrt((sum(squares) + tail_squares) / (float)size + eps);
  for (i = 0; i + W <= size; i += W) {
    store(out + i, load(residual + i) * scale * load(weight + i));
  }
  for (; i < size; ++i) assign(out + i, to_float(residual[i]) * scale * to_float(weight[i]));
}

template <class T>
static void norm_rows(const void* x, void* residual, const void* weight, void* out, int64_t rows,
                      int64_t size, float eps) {
  parallel_for(rows, 16384 / (size + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      norm_row((const T*)x + r * size, (T*)residual + r * size, (const T*)weight,
               (T*)out + r * size, size, eps);
    }
  });
}

static void add_rms_norm(bool half, const void* x, void* residual, const void* weight, void* out,
                         int64_t rows, int64_t size, float eps) {
  (half ? norm_rows<bf16> : norm_rows<float>)(x, residual, weight, out, rows, size, eps);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
