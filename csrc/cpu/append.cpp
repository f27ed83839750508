// Rows of two embedding tables, copied; and the sum of the special rows' gradients.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/append.cpp"
#include "common/each_isa.h"
#include "cpu/ops.h"

namespace gen_fast {

int64_t append(const void* table, const void* special, const int64_t* ids, void* out,
               int64_t rows, int64_t vocabulary, int64_t n_special, int64_t row_bytes) {
  for (int64_t r = 0; r < rows; ++r) {
    if (ids[r] < 0 || ids[r] >= vocabulary + n_special) return r;
  }
  parallel_for(rows, 65536 / (row_bytes + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const char* from = ids[r] < vocabulary
                             ? (const char*)table + ids[r] * row_bytes
                             : (const char*)special + (ids[r] - vocabulary) * row_bytes;
      std::memcpy((char*)out + r * row_bytes, from, row_bytes);
    }
  });
  return -1;
}

void append_backward(Dtype dtype, const void* grad, const int64_t* ids, float* out, int64_t rows,
                     int64_t vocabulary, int64_t n_special, int64_t size) {
  GEN_FAST_DISPATCH(append_backward)
  (dtype == Dtype::bf16, grad, ids, out, rows, vocabulary, n_special, size);
}

}  // namespace gen_fast

#else
#include "common/vector.h"

namespace gen_fast::GEN_FAST_ISA {

// Threads share the columns, not the rows: each sum is made in the order of the rows, whatever
// the number of threads.
template <class T>
static void sum_special(const void* grad, const int64_t* ids, float* out, int64_t rows,
                        int64_t vocabulary, int64_t n_special, int64_t size) {
  parallel_for((size + W - 1) / W, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * W, end = last * W < size ? last * W : size;
    for (int64_t k = 0; k < n_special; ++k) {
      std::memset(out + k * size + begin, 0, (end - begin) * sizeof(float));
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (ids[r] < vocabulary) continue;
      float* to = out + (ids[r] - vocabulary) * size;
      const T* from = (const T*)grad + r * size;
      int64_t i = begin;
      for (; i + W <= end; i += W) store(to + i, load(to + i) + load(from + i));
      for (; i < end; ++i) to[i] += to_float(from[i]);
    }
  });
}

static void append_backward(bool is_bf16, const void* grad, const int64_t* ids, float* out,
                            int64_t rows, int64_t vocabulary, int64_t n_special, int64_t size) {
  (is_bf16 ? sum_special<bf16> : sum_special<float>)(grad, ids, out, rows, vocabulary, n_special,
                                                  size);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
