// Quantisation of a row to int8. Included once for each instruction set, after vector.h.

namespace gen_fast::GEN_FAST_ISA {

constexpr float LARGEST = 127.0f;
// Adding it leaves no fraction bits, rounded to nearest even; the low byte is the integer.
constexpr float ROUND = 12582912.0f;  // 1.5 · 2^23

typedef int8_t vb __attribute__((vector_size(W)));

static inline void store_low_bytes(int8_t* out, vf shifted) {
#if defined(GEN_FAST_BF16_DOT)
  const __m128i q = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)shifted);
#else
  const vb q = __builtin_convertvector((vu)shifted, vb);
#endif
  std::memcpy(out, &q, sizeof q);
}

// max |x| of whole vectors of a row; NaN if there is one, whose bits are above those of infinity.
template <class T>
static inline float peak_of(const T* x, int64_t size) {
  vi peaks = {};
  for (int64_t i = 0; i + W <= size; i += W) {
    const vi bits = (vi)load(x + i) & 0x7fffffff;
    peaks = bits > peaks ? bits : peaks;
  }
  int32_t each[W], peak = 0;
  std::memcpy(each, &peaks, sizeof each);
  for (int i = 0; i < W; ++i) peak = each[i] > peak ? each[i] : peak;
  float result;
  std::memcpy(&result, &peak, 4);
  return result;
}

// x / scale rounded to nearest even, scale = max |x| / 127, which is returned; not finite if the
// row is not.
template <class T>
static inline float quantize_row(const T* x, int8_t* out, int64_t size) {
  const int64_t whole = size / W * W;
  float peak = peak_of(x, size);
  for (int64_t i = whole; i < size; ++i) {
    const float v = std::fabs(to_float(x[i]));
    if (v > peak || v != v) peak = v;
  }
  const float scale = peak / LARGEST, divisor = scale > 0 ? scale : 1.0f;
  for (int64_t i = 0; i < whole; i += W) store_low_bytes(out + i, load(x + i) / divisor + ROUND);
  for (int64_t i = whole; i < size; ++i) out[i] = (int8_t)std::nearbyint(to_float(x[i]) / divisor);
  return scale;
}

}  // namespace gen_fast::GEN_FAST_ISA
