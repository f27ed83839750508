// Quantisation of a row to int8. Included once for each instruction set, after vector.h.

namespace gen_fast::GEN_FAST_ISA {

constexpr float LARGEST = 127.0f;
// Adding it leaves no fraction bits, rounded to nearest even; the low byte is the integer.
constexpr float ROUND = 12582912.0f;  // 1.5 · 2^23

typedef int8_t vb __attribute__((vector_size(W)));

// x / scale rounded to nearest even, scale = max |x| / 127, which is returned; not finite if the row
// is not.
template <class T>
static inline float quantize_row(const T* x, int8_t* out, int64_t size) {
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

}  // namespace gen_fast::GEN_FAST_ISA
