// The mean of each text's normed rows: a row is read once for its norm and, from cache, once for
// the sum. Eager torch writes the normed rows, and again the weighted ones.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/pool.cpp"
#include "common/each_isa.h"
#include "cpu/ops.h"

namespace gen_fast {

void pool(Dtype dtype, const void* hidden, const int32_t* cu_seqlens, const void* norm_weight,
          const float* row_weights, float* out, int64_t texts, int64_t size, float eps) {
  GEN_FAST_DISPATCH(pool)
  (dtype == Dtype::bf16, hidden, cu_seqlens, norm_weight, row_weights, out, texts, size, eps);
}

}  // namespace gen_fast

#else
#include "common/vector.h"
#include "common/rms.h"

namespace gen_fast::GEN_FAST_ISA {

template <class T>
static void add_row(const T* row, float* out, int64_t size, float share, float eps) {
  const float scale = share * inverse_rms(row, size, eps);
  int64_t i = 0;
  for (; i + W <= size; i += W) store(out + i, load(out + i) + load(row + i) * scale);
  for (; i < size; ++i) out[i] += to_float(row[i]) * scale;
}

template <class T>
static void pool_texts(const void* hidden, const int32_t* cu_seqlens, const void* norm_weight,
                       const float* row_weights, float* out, int64_t texts, int64_t size,
                       float eps) {
  parallel_for(texts, rows_worth_a_thread(size), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* mean = out + t * size;
      std::memset(mean, 0, size * sizeof(float));
      const int32_t first = cu_seqlens[t], last = cu_seqlens[t + 1];
      for (int32_t r = first; r < last; ++r) {
        const float share = row_weights ? row_weights[r] : 1.0f / (float)(last - first);
        add_row((const T*)hidden + r * size, mean, size, share, eps);
      }
      // The mean of no rows is NaN, as 0/0 is.
      const float known = first < last ? 1.0f : NAN;
      for (int64_t i = 0; i < size; ++i) mean[i] *= known * to_float(((const T*)norm_weight)[i]);
    }
  });
}

static void pool(bool is_bf16, const void* hidden, const int32_t* cu_seqlens,
                 const void* norm_weight, const float* row_weights, float* out, int64_t texts,
                 int64_t size, float eps) {
  (is_bf16 ? pool_texts<bf16> : pool_texts<float>)(hidden, cu_seqlens, norm_weight, row_weights,
                                                   out, texts, size, eps);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
