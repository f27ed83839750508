// Symmetric quantisation of rows to int8: a pass for the largest magnitude, which leaves the row in
// the first-level cache, and one that scales and rounds.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/qlinear.cpp"
#include <vector>

#include "cpu/ops.h"
#include "common/each_isa.h"

namespace gen_fast {

void quantize_rows(Dtype dtype, const void* x, int8_t* out, float* scales, int64_t rows,
                   int64_t size, bool rotated) {
  GEN_FAST_DISPATCH(quantize_rows)(dtype == Dtype::bf16, x, out, scales, rows, size, rotated);
}

}  // namespace gen_fast

#else
#include "common/vector.h"
#include "common/product.h"
#include "common/quantize.h"

namespace gen_fast::GEN_FAST_ISA {

template <class T>
static void quantize_each(const void* x, int8_t* out, float* scales, int64_t rows, int64_t size,
                          bool rotated) {
  parallel_for(rows, rows_worth_a_thread(size), [&](int64_t begin, int64_t end) {
    std::vector<float> wide(rotated ? size : 0);
    for (int64_t r = begin; r < end; ++r) {
      const T* row = (const T*)x + r * size;
      if (rotated) {
        copy_row(wide.data(), row, size);
        scales[r] = finish_row(wide.data(), out + r * size, size, rotated);
      } else {
        scales[r] = quantize_row(row, out + r * size, size);
      }
    }
  });
}

static void quantize_rows(bool is_bf16, const void* x, int8_t* out, float* scales, int64_t rows,
                          int64_t size, bool rotated) {
  (is_bf16 ? quantize_each<bf16> : quantize_each<float>)(x, out, scales, rows, size, rotated);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
