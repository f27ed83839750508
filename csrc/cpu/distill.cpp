// Cross-entropy of rows of logits, and its gradient in their place. A row stays in the second-level
// cache over the three times it is read; eager torch makes as many passes over all of memory.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/distill.cpp"
#include "common/each_isa.h"
#include "cpu/ops.h"

namespace gen_fast {

int64_t cross_entropy(Dtype dtype, void* logits, const int64_t* targets, float* losses,
                      int64_t rows, int64_t vocabulary) {
  for (int64_t r = 0; r < rows; ++r) {
    if (targets[r] < 0 || targets[r] >= vocabulary) return r;
  }
  GEN_FAST_DISPATCH(cross_entropy)
  (dtype == Dtype::bf16, logits, targets, losses, rows, vocabulary);
  return -1;
}

}  // namespace gen_fast

#else
#include "common/vector.h"

namespace gen_fast::GEN_FAST_ISA {

template <class T>
static float row_loss(T* logits, int64_t target, int64_t size) {
  const float picked = to_float(logits[target]);
  vf top = splat(-INFINITY);
  float highest = -INFINITY;
  int64_t i = 0;
  for (; i + W <= size; i += W) top = max(load(logits + i), top);
  for (; i < size; ++i) highest = std::fmax(highest, to_float(logits[i]));
  highest = std::fmax(highest, max_of(top));

  vf masses = {};
  float mass = 0;
  for (i = 0; i + W <= size; i += W) masses += exp2((load(logits + i) - highest) * LOG2_E);
  for (; i < size; ++i) mass += std::exp(to_float(logits[i]) - highest);
  mass += sum(masses);

  const float inverse = 1.0f / mass;
  for (i = 0; i + W <= size; i += W) {
    store(logits + i, exp2((load(logits + i) - highest) * LOG2_E) * inverse);
  }
  for (; i < size; ++i) assign(logits + i, std::exp(to_float(logits[i]) - highest) * inverse);
  const float chance = std::exp(picked - highest) * inverse;
  assign(logits + target, chance - 1.0f);
  return highest + std::log(mass) - picked;
}

template <class T>
static void row_losses(void* logits, const int64_t* targets, float* losses, int64_t rows,
                       int64_t vocabulary) {
  parallel_for(rows, rows_worth_a_thread(vocabulary), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      losses[r] = row_loss((T*)logits + r * vocabulary, targets[r], vocabulary);
    }
  });
}

static void cross_entropy(bool is_bf16, void* logits, const int64_t* targets, float* losses,
                          int64_t rows, int64_t vocabulary) {
  (is_bf16 ? row_losses<bf16> : row_losses<float>)(logits, targets, losses, rows, vocabulary);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
