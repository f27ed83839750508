// Float vectors of the instruction set being compiled (see each_isa.h): no include guard, it is
// included once for each. Written with the vector extensions of GCC and Clang.
//
// bf16 is the storage type of bfloat16; arithmetic is always float32.

#define INLINE __attribute__((always_inline))

namespace gen_fast::GEN_FAST_ISA {

struct bf16 {
  uint16_t bits;
};

constexpr int W = GEN_FAST_VECTOR_BYTES / 4;  // floats in a vector
constexpr float LOG2_E = 1.442695041f, LN_2 = 0.6931471806f;
typedef float vf __attribute__((vector_size(GEN_FAST_VECTOR_BYTES)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(GEN_FAST_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(GEN_FAST_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(GEN_FAST_VECTOR_BYTES / 2)));

static inline vf splat(float x) { return x - vf{}; }

static inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

static inline vi load(const int32_t* p) {
  vi v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(int32_t* p, vi v) { std::memcpy(p, &v, sizeof v); }

// Of the general conversion GCC 12 makes six instructions for AVX-512.
static inline vu widen(vh h) {
#if defined(GEN_FAST_BF16_DOT)
  return (vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}

static inline vf from_bf16(vh h) { return (vf)(widen(h) << 16); }

static inline vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return from_bf16(h);
}

// Rounds to nearest even; NaN stays NaN.
static inline vh to_bf16(vf v) {
#if defined(GEN_FAST_BF16_DOT)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  vh out;
  std::memcpy(&out, &h, sizeof out);
  return out;
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu nan = (vu)(v != v);
  rounded = (rounded & ~nan) | (nan & 0x7fc0);
  return __builtin_convertvector(rounded, vh);
#endif
}

static inline void store(bf16* p, vf v) {
  const vh h = to_bf16(v);
  std::memcpy(p, &h, sizeof h);
}

// Stores `v` and returns what a load would give, without waiting for memory.
static inline vf store_rounded(float* p, vf v) {
  store(p, v);
  return v;
}

static inline vf store_rounded(bf16* p, vf v) {
  const vh h = to_bf16(v);
  std::memcpy(p, &h, sizeof h);
  return from_bf16(h);
}

static inline float to_float(float x) { return x; }

static inline float to_float(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

static inline void assign(float* p, float x) { *p = x; }

static inline void assign(bf16* p, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  p->bits = x != x ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline float sum(vf v) {
  v4 part[W / 4];
  std::memcpy(part, &v, sizeof v);
  for (int i = 1; i < W / 4; ++i) part[0] += part[i];
  return (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
}

static inline vf max(vf a, vf b) { return a > b ? a : b; }

static inline vf min(vf a, vf b) { return a < b ? a : b; }

static inline float max_of(vf v) {
  v4 part[W / 4];
  std::memcpy(part, &v, sizeof v);
  for (int i = 1; i < W / 4; ++i) part[0] = part[0] > part[i] ? part[0] : part[i];
  const float a = part[0][0] > part[0][1] ? part[0][0] : part[0][1];
  const float b = part[0][2] > part[0][3] ? part[0][2] : part[0][3];
  return a > b ? a : b;
}

// 1/x for normal x up to 2^126, relative error below 1e-7; where it is an estimate, NaN for 0 and
// infinity. The hardware's division is the slowest thing a vector can do.
static inline vf reciprocal(vf x) {
#if defined(GEN_FAST_BF16_DOT)
  const vf guess = (vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// 2^x, relative error below 3e-7; 0 or denormal below -126, NaN for NaN, and the caller keeps x at
// most 127. 2^x = 2^n · 2^f with n the nearest integer; 2^f on [-1/2, 1/2] is the polynomial of
// degree 5 whose largest relative error (9.2e-8) is least among those that are 1 at 0.
static inline vf exp2(vf x) {
#if defined(GEN_FAST_BF16_DOT)
  const vf f = (vf)_mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  // Adding 1.5 · 2^23 leaves no fraction bits: rounds to nearest, and n sits in the low bits.
  const vf clamped = max(x, splat(-126.0f));
  const vf shifted = clamped + 12582912.0f;
  const vf f = clamped - (shifted - 12582912.0f);
#endif
  vf p = splat(1.326472725e-3f);
  p = p * f + 9.671512688e-3f;
  p = p * f + 5.550733744e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
#if defined(GEN_FAST_BF16_DOT)
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)(x - f));
#else
  const vf power = (vf)(((vu)shifted << 23) + 0x3f800000u);
  const vf result = x < -126.0f ? splat(0.0f) : p * power;
  return x == x ? result : x;
#endif
}

// body(0), …, body(N - 1), each as a constant. GCC unrolls plain loops too late to keep an array
// that they index in registers: it stores every tile to the stack besides.
template <int N, int i = 0, class Body>
static inline INLINE void unrolled(const Body& body) {
  body(std::integral_constant<int, i>());
  if constexpr (i + 1 < N) unrolled<N, i + 1>(body);
}

}  // namespace gen_fast::GEN_FAST_ISA
