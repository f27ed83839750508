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

// N values, `stride` apart, times the Hadamard matrix [N, N]. V: vf for W neighbours at once.
template <int N, class V>
static inline void rotate_values(float* x, int64_t stride) {
  V v[N];
  unrolled<N>([&](auto i) INLINE { std::memcpy(&v[i], x + i * stride, sizeof v[i]); });
  unrolled<3>([&](auto stage) INLINE {
    constexpr int half = 1 << stage;
    unrolled<N>([&](auto i) INLINE {
      if constexpr (half < N && (i & half) == 0) {
        const V a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
      }
    });
  });
  unrolled<N>([&](auto i) INLINE { std::memcpy(x + i * stride, &v[i], sizeof v[i]); });
}

// In every N runs of the row: the values that are a run apart, together.
template <int N>
static inline void rotate_runs(float* x, int64_t size, int64_t run) {
  for (int64_t first = 0; first < size; first += N * run) {
    int64_t i = 0;
    for (; i + W <= run; i += W) rotate_values<N, vf>(x + first + i, run);
    for (; i < run; ++i) rotate_values<N, float>(x + first + i, run);
  }
}

// The row, as a matrix [count, size / count], becomes the Hadamard matrix [count, count] times it;
// count is the largest power of two up to 64 that divides the size. Returns the 1 / sqrt(count)
// that is still to be multiplied by.
static inline float rotate(float* x, int64_t size) {
  int64_t count = 64, run;
  while (size % count) count /= 2;
  for (run = size / count; size / run >= 8; run *= 8) rotate_runs<8>(x, size, run);
  if (size / run == 4) rotate_runs<4>(x, size, run);
  if (size / run == 2) rotate_runs<2>(x, size, run);
  return 1.0f / std::sqrt((float)count);
}

// quantize_row of a row of floats that may be changed, rotated before if asked.
static inline float finish_row(float* x, int8_t* out, int64_t size, bool rotated) {
  const float factor = rotated ? rotate(x, size) : 1.0f;
  return quantize_row(x, out, size) * factor;
}

}  // namespace gen_fast::GEN_FAST_ISA
