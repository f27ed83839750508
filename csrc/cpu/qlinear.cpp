// Symmetric quantisation of rows to int8: a pass for the largest magnitude, which leaves the row in
// the first-level cache, and one that scales and rounds.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/qlinear.cpp"
#include "cpu/ops.h"
#include "common/each_isa.h"

namespace gen_fast {

void quantize_rows(Dtype dtype, const void* x, int8_t* out, float* scales, int64_t rows,
                   int64_t size) {
  GEN_FAST_DISPATCH(quantize_rows)(dtype == Dtype::bf16, x, out, scales, rows, size);
}

}  // namespace gen_fast

#else
#include "common/vector.h"

namespace gen_fast::GEN_FAST_ISA {

constexpr float LARGEST = 127.0f;
// Adding it leaves no fraction bits, rounded to nearest even; the low byte is the integer.
constexpr float ROUND = 12582912.0f;  // 1.5 · 2^23

typedef int8_t vb __attribute__((vector_size(W)));

template <class T>
static float quantize_row(const T* x, int8_t* out, int64_t size) {
  vf peaks = {}, wrong = {};  // a maximum does not keep NaN, a sum does
  float peak = 0;
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    const vf v = load(x + i);
    peaks = max(peaks, max(v, -v));
    wrong += v == v ? vf{} : v;
  }
  float nan = sum(wrong);
  for (; i < size; ++i) {
    const float v = to_float(x[i]);
    peak = std::fmax(peak, std::fabs(v));
    if (v != v) nan = v;
  }
  const float scale = std::fmax(peak, max_of(peaks)) / LARGEST + nan;
  const float divisor = scale > 0 ? scale : 1.0f;
  for (i = 0; i + W <= size; i += W) {
    const vb q = __builtin_convertvector((vu)(load(x + i) / divisor + ROUND), vb);
    std::memcpy(out + i, &q, sizeof q);
  }
  for (; i < size; ++i) out[i] = (int8_t)std::nearbyint(to_float(x[i]) / divisor);
  return scale;
}

template <class T>
static void quantize_each(const void* x, int8_t* out, float* scales, int64_t rows, int64_t size) {
  parallel_for(rows, 16384 / (size + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      scales[r] = quantize_row((const T*)x + r * size, out + r * size, size);
    }
  });
}

static void quantize_rows(bool half, const void* x, int8_t* out, float* scales, int64_t rows,
                          int64_t size) {
  (half ? quantize_each<bf16> : quantize_each<float>)(x, out, scales, rows, size);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
