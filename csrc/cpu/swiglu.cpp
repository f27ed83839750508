// silu(gate) * up in one pass; eager torch makes two and keeps an intermediate.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/swiglu.cpp"
#include "common/each_isa.h"
#include "cpu/ops.h"

namespace gen_fast {

void swiglu(Dtype dtype, const void* gate_up, void* out, int64_t rows, int64_t size) {
  GEN_FAST_DISPATCH(swiglu)(dtype == Dtype::bf16, gate_up, out, rows, size);
}

}  // namespace gen_fast

#else
#include "common/vector.h"

namespace gen_fast::GEN_FAST_ISA {

template <class T>
static void swiglu_row(const T* gate, const T* up, T* out, int64_t size) {
  constexpr float log2_e = 1.442695041f;
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    vf g = load(gate + i);
    vf decay = exp2(min(g * -log2_e, splat(126.0f)));
    store(out + i, g / (1.0f + decay) * load(up + i));
  }
  for (; i < size; ++i) {
    const float g = to_float(gate[i]);
    assign(out + i, g / (1.0f + std::exp(-g)) * to_float(up[i]));
  }
}

template <class T>
static void swiglu_rows(const void* gate_up, void* out, int64_t rows, int64_t size) {
  parallel_for(rows, 16384 / (size + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* gate = (const T*)gate_up + r * 2 * size;
      swiglu_row(gate, gate + size, (T*)out + r * size, size);
    }
  });
}

static void swiglu(bool half, const void* gate_up, void* out, int64_t rows, int64_t size) {
  (half ? swiglu_rows<bf16> : swiglu_rows<float>)(gate_up, out, rows, size);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
