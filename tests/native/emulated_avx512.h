// The AVX-512, AVX-VNNI and AMX intrinsics of csrc/, computed with AVX2: for tests on processors
// without them.
//
// In a build with GEN_FAST_EMULATED, common/each_isa.h includes this file and compiles the
// versions for all of these for AVX2. The functions have the intrinsics' own names, in namespace
// gen_fast, where they hide the compiler's: csrc/ calls them unchanged. One that is missing here
// fails to compile, as the compiler's own needs AVX-512; one of AMX, which GCC has as assembly, fails
// when it runs.
// Plain vector arithmetic needs nothing: GCC and Clang split vectors of 64 bytes themselves.
//
// They do what Intel's manual says, one lane after the other, and test_emulation.py compares them
// with it. SIMDe has too few of them (of version 0.7.4 cvtneps_pbh, reduce_ps, rcp14_ps and several
// maskz forms are missing). What is not as in hardware:
// - Speed, alignment, and exceptions: no flag is set, and MXCSR is taken to have its usual value.
// - Which NaN: the sign and payload of one that comes from two operands.
// - rcp14 errs by up to 2^-14, as it may, but not by the same amount as any processor.
// - bfloat16 products: each is added with one rounding to nearest even, odd elements first, and
//   denormals are zeros, as the manual says. Processors that add the two products first differ in the
//   last bits. A sum that only rounding brings to 2^-126 is not flushed to zero.
// - AMX: what would be a fault aborts with a message. A load that begins at a later row does too.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// Compilers have these as macros, some only where they do not optimise.
#undef _mm256_dpbusd_avx_epi32
#undef _mm512_maskz_reduce_ps
#undef _mm512_maskz_shuffle_i32x4
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_loadd
#undef _tile_stored
#undef _tile_stream_loadd
#undef _tile_zero

namespace gen_fast {

namespace emulated {

template <class Lane, int count>
struct Lanes {
  Lane at[count];
};
typedef Lanes<float, 16> F32;
typedef Lanes<int32_t, 16> I32;
typedef Lanes<uint32_t, 16> U32;
typedef Lanes<uint64_t, 8> U64;
typedef Lanes<int8_t, 64> I8;
typedef Lanes<uint8_t, 64> U8;

template <class To, class From>
static inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Each lane in another type.
template <class To, class From, int count>
static inline Lanes<To, count> converted(const Lanes<From, count>& from) {
  Lanes<To, count> to;
  for (int i = 0; i < count; ++i) to.at[i] = (To)from.at[i];
  return to;
}

// The lanes as a vector, zero where the mask's bit is.
template <class Vector, class Lane, int count>
static inline Vector masked(uint32_t mask, Lanes<Lane, count> lanes) {
  for (int i = 0; i < count; ++i) lanes.at[i] = mask >> i & 1 ? lanes.at[i] : Lane();
  return bits_of<Vector>(lanes);
}

static inline float quiet(float nan) {
  return bits_of<float>(bits_of<uint32_t>(nan) | 0x00400000);
}

// Zero, with its sign, for what is denormal.
static inline float flushed(float x) {
  const uint32_t bits = bits_of<uint32_t>(x);
  return bits_of<float>(bits & 0x7f800000 ? bits : bits & 0x80000000);
}

static inline float low_bf16(uint32_t pair) { return flushed(bits_of<float>(pair << 16)); }

static inline float high_bf16(uint32_t pair) { return flushed(bits_of<float>(pair & 0xffff0000)); }

static inline float add_product(float sum, float a, float b) {
  return flushed(__builtin_fmaf(a, b, sum));
}

static inline float reduced(float a, int control) {
  if (a != a) return quiet(a);
  if (std::isinf(a)) return 0.0f;
  const double scale = (double)(1 << (control >> 4)), scaled = a * scale;
  const int rounding = control & 4 ? _MM_FROUND_TO_NEAREST_INT : control & 3;
  const double rounded = rounding == _MM_FROUND_TO_NEAREST_INT ? std::nearbyint(scaled)
                         : rounding == _MM_FROUND_TO_NEG_INF   ? std::floor(scaled)
                         : rounding == _MM_FROUND_TO_POS_INF   ? std::ceil(scaled)
                                                               : std::trunc(scaled);
  // The difference too is rounded the way that control says. To nearest and to zero it is exact.
  const double whole = rounded / scale, exact = a - whole, part = exact - a;
  const double error = (a - (exact - part)) + (-whole - part);
  float result = (float)exact;
  const int way = rounding == _MM_FROUND_TO_POS_INF ? 1 : rounding == _MM_FROUND_TO_NEG_INF ? -1 : 0;
  const double beyond = way * (exact - result);
  if (way != 0 && (beyond > 0 || (beyond == 0 && way * error > 0))) {
    result = std::nextafter(result, way * INFINITY);
  }
  return result == 0 ? (rounding == _MM_FROUND_TO_NEG_INF ? -0.0f : 0.0f) : result;
}

// a · 2^floor(b).
static inline float scaled(float a, float b) {
  if (a != a) {  // a quiet NaN, its bit 22 set, gives way to infinite powers
    const bool is_quiet = bits_of<uint32_t>(a) & 0x00400000;
    return is_quiet && std::isinf(b) ? (b > 0 ? INFINITY : 0.0f) : quiet(a);
  }
  if (b != b) return quiet(b);
  if ((b == INFINITY && a == 0) || (b == -INFINITY && std::isinf(a))) {
    return bits_of<float>(0xffc00000);
  }
  // Within these bounds the double is exact, and beyond them the float is infinite or zero.
  const double power = b > 300 ? 300 : b < -300 ? -300 : std::floor((double)b);
  return (float)std::ldexp((double)a, (int)power);
}

// 1/x to 14 bits: no more exact than the instruction has to be.
static inline float estimated_reciprocal(float x) {
  if (x != x) return quiet(x);
  const uint64_t bits = bits_of<uint64_t>(1.0 / x), unit = (uint64_t)1 << 39;
  return (float)bits_of<double>((bits + unit / 2) & ~(unit - 1));
}

static inline uint16_t rounded_to_bf16(float x) {
  const uint32_t bits = bits_of<uint32_t>(flushed(x));
  if (x != x) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The pairs of lanes `first` and first + 1 of a and b that lie side by side in each 16 bytes.
template <class L>
static inline L interleaved(const L& a, const L& b, int first) {
  const int count = sizeof(L) / sizeof(a.at[0]), in_16_bytes = 16 / sizeof(a.at[0]);
  L out;
  for (int i = 0; i < count; ++i) {
    const int from = i / in_16_bytes * in_16_bytes + first + i % in_16_bytes / 2;
    out.at[i] = i % 2 ? b.at[from] : a.at[from];
  }
  return out;
}

// sum + the four products of bytes; it wraps.
template <class A>
static inline int32_t add_products(int32_t sum, const A* a, const int8_t* b) {
  uint32_t total = (uint32_t)sum;
  for (int i = 0; i < 4; ++i) total += (uint32_t)(a[i] * b[i]);
  return (int32_t)total;
}

}  // namespace emulated

static inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, sizeof v); }

// Does not read what is masked out.
static inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* p) {
  emulated::I32 out = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) std::memcpy(&out.at[i], (const int32_t*)p + i, 4);
  }
  return emulated::bits_of<__m512i>(out);
}

static inline __m512i _mm512_set1_epi32(int x) {
  emulated::I32 out;
  for (int i = 0; i < 16; ++i) out.at[i] = x;
  return emulated::bits_of<__m512i>(out);
}

static inline __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }

#define GEN_FAST_UNPACK(name, mask_type, element, first)                              \
  static inline __m512i name(mask_type mask, __m512i a, __m512i b) {                  \
    using namespace emulated;                                                         \
    return masked<__m512i>(                                                           \
        mask, interleaved(bits_of<element>(a), bits_of<element>(b), first));          \
  }
GEN_FAST_UNPACK(_mm512_maskz_unpacklo_epi32, __mmask16, U32, 0)
GEN_FAST_UNPACK(_mm512_maskz_unpackhi_epi32, __mmask16, U32, 2)
GEN_FAST_UNPACK(_mm512_maskz_unpacklo_epi64, __mmask8, U64, 0)
GEN_FAST_UNPACK(_mm512_maskz_unpackhi_epi64, __mmask8, U64, 1)
#undef GEN_FAST_UNPACK

static inline __m512i _mm512_maskz_shuffle_i32x4(__mmask16 mask, __m512i a, __m512i b, int which) {
  using namespace emulated;
  const U32 first = bits_of<U32>(a), second = bits_of<U32>(b);
  U32 out;
  for (int i = 0; i < 16; ++i) {
    const int from = (which >> i / 4 * 2 & 3) * 4 + i % 4;
    out.at[i] = i < 8 ? first.at[from] : second.at[from];
  }
  return masked<__m512i>(mask, out);
}

static inline __m512i _mm512_maskz_mul_epu32(__mmask8 mask, __m512i a, __m512i b) {
  using namespace emulated;
  const U64 first = bits_of<U64>(a), second = bits_of<U64>(b);
  U64 out;
  for (int i = 0; i < 8; ++i) out.at[i] = (first.at[i] & 0xffffffff) * (second.at[i] & 0xffffffff);
  return masked<__m512i>(mask, out);
}

static inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  using namespace emulated;
  const U8 first = bits_of<U8>(a);
  const I8 second = bits_of<I8>(b);
  I32 out = bits_of<I32>(sum);
  for (int i = 0; i < 16; ++i) {
    out.at[i] = add_products(out.at[i], first.at + 4 * i, second.at + 4 * i);
  }
  return bits_of<__m512i>(out);
}

static inline __m256i _mm256_dpbusd_avx_epi32(__m256i sum, __m256i a, __m256i b) {
  __m512i wide[3] = {};
  std::memcpy(&wide[0], &sum, 32), std::memcpy(&wide[1], &a, 32), std::memcpy(&wide[2], &b, 32);
  wide[0] = _mm512_dpbusd_epi32(wide[0], wide[1], wide[2]);
  std::memcpy(&sum, &wide[0], 32);
  return sum;
}

static inline __m512i _mm512_maskz_cvtepu8_epi32(__mmask16 mask, __m128i a) {
  using namespace emulated;
  return masked<__m512i>(mask, converted<uint32_t>(bits_of<Lanes<uint8_t, 16>>(a)));
}

static inline __m512i _mm512_maskz_cvtepu16_epi32(__mmask16 mask, __m256i a) {
  using namespace emulated;
  return masked<__m512i>(mask, converted<uint32_t>(bits_of<Lanes<uint16_t, 16>>(a)));
}

static inline __m128i _mm512_maskz_cvtepi32_epi8(__mmask16 mask, __m512i a) {
  using namespace emulated;
  return masked<__m128i>(mask, converted<uint8_t>(bits_of<U32>(a)));
}

static inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  using namespace emulated;
  return bits_of<__m512>(converted<float>(bits_of<I32>(a)));
}

static inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
  using namespace emulated;
  const F32 from = bits_of<F32>(a);
  Lanes<uint16_t, 16> out;
  for (int i = 0; i < 16; ++i) out.at[i] = rounded_to_bf16(from.at[i]);
  return bits_of<__m256bh>(out);
}

static inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  using namespace emulated;
  const F32 from[2] = {bits_of<F32>(low), bits_of<F32>(high)};
  Lanes<uint16_t, 32> out;
  for (int i = 0; i < 32; ++i) out.at[i] = rounded_to_bf16(from[i / 16].at[i % 16]);
  return bits_of<__m512bh>(out);
}

static inline __m512 _mm512_maskz_permutexvar_ps(__mmask16 mask, __m512i index, __m512 a) {
  using namespace emulated;
  const U32 at = bits_of<U32>(index);
  const F32 from = bits_of<F32>(a);
  F32 out;
  for (int i = 0; i < 16; ++i) out.at[i] = from.at[at.at[i] % 16];
  return masked<__m512>(mask, out);
}

static inline __m512i _mm512_maskz_permutexvar_epi16(__mmask32 mask, __m512i index, __m512i a) {
  using namespace emulated;
  typedef Lanes<uint16_t, 32> Halves;
  const Halves at = bits_of<Halves>(index), from = bits_of<Halves>(a);
  Halves out;
  for (int i = 0; i < 32; ++i) out.at[i] = from.at[at.at[i] % 32];
  return masked<__m512i>(mask, out);
}

static inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  using namespace emulated;
  const U32 first = bits_of<U32>(a), second = bits_of<U32>(b);
  F32 out = bits_of<F32>(sum);
  for (int i = 0; i < 16; ++i) {
    const float odd = add_product(flushed(out.at[i]), high_bf16(first.at[i]),
                                  high_bf16(second.at[i]));
    out.at[i] = add_product(odd, low_bf16(first.at[i]), low_bf16(second.at[i]));
  }
  return bits_of<__m512>(out);
}

static inline __m512 _mm512_maskz_rcp14_ps(__mmask16 mask, __m512 a) {
  using namespace emulated;
  F32 lanes = bits_of<F32>(a);
  for (float& x : lanes.at) x = estimated_reciprocal(x);
  return masked<__m512>(mask, lanes);
}

static inline __m512 _mm512_maskz_reduce_ps(__mmask16 mask, __m512 a, int control) {
  using namespace emulated;
  F32 lanes = bits_of<F32>(a);
  for (float& x : lanes.at) x = reduced(x, control);
  return masked<__m512>(mask, lanes);
}

static inline __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
  using namespace emulated;
  F32 lanes = bits_of<F32>(a);
  const F32 powers = bits_of<F32>(b);
  for (int i = 0; i < 16; ++i) lanes.at[i] = scaled(lanes.at[i], powers.at[i]);
  return masked<__m512>(mask, lanes);
}

namespace emulated {

// A thread's tiles. A tile that is not configured has no rows.
struct Tile {
  int rows, bytes;
  uint8_t row[16][64];
};
inline thread_local Tile tiles[8];

[[noreturn]] static inline void fault(const char* why) {
  std::fprintf(stderr, "emulated AMX: %s\n", why);
  std::abort();
}

static inline Tile& tile_of(int number) {
  if (number < 0 || number > 7) fault("there are tiles 0 to 7");
  if (!tiles[number].rows) fault("a tile is used that is not configured");
  return tiles[number];
}

// The tiles of sum += a · b, elements of which are in groups of four bytes.
struct Product {
  Tile &sum, &a, &b;

  Product(int to, int left, int right) : sum(tile_of(to)), a(tile_of(left)), b(tile_of(right)) {
    if (to == left || to == right || left == right) fault("a product needs three tiles");
    if (sum.bytes % 4 || a.bytes % 4 || b.bytes % 4) fault("rows are not whole groups of 4 bytes");
    if (sum.rows != a.rows) fault("the sum has not as many rows as the left tile");
    if (sum.bytes != b.bytes) fault("the sum's rows are not as long as the right tile's");
    if (a.bytes / 4 != b.rows) fault("the left tile's rows are not as long as the right has rows");
  }
};

static inline uint32_t group_of(const Tile& tile, int row, int column) {
  uint32_t group;
  std::memcpy(&group, tile.row[row] + 4 * column, 4);
  return group;
}

}  // namespace emulated

static inline void _tile_release() { std::memset((void*)emulated::tiles, 0, sizeof emulated::tiles); }

static inline void _tile_loadconfig(const void* from) {
  uint8_t config[64];
  std::memcpy(config, from, sizeof config);
  _tile_release();
  if (config[0] == 0) return;
  if (config[0] != 1) emulated::fault("there is no such palette");
  if (config[1] != 0) emulated::fault("loads that begin at a later row are not emulated");
  for (int i = 2; i < 64; ++i) {
    const bool used = (i >= 16 && i < 32) || (i >= 48 && i < 56);
    if (!used && config[i]) emulated::fault("a reserved byte of the configuration is not zero");
  }
  for (int i = 0; i < 8; ++i) {
    const int bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8, rows = config[48 + i];
    if (rows > 16) emulated::fault("a tile has at most 16 rows");
    if (bytes > 64) emulated::fault("a row of a tile has at most 64 bytes");
    if (!rows != !bytes) emulated::fault("a tile has rows without bytes, or bytes without rows");
    emulated::tiles[i].rows = rows;
    emulated::tiles[i].bytes = bytes;
  }
}

static inline void _tile_zero(int tile) {
  emulated::Tile& to = emulated::tile_of(tile);
  std::memset(to.row, 0, sizeof to.row);
}

static inline void _tile_loadd(int tile, const void* from, int64_t stride) {
  emulated::Tile& to = emulated::tile_of(tile);
  std::memset(to.row, 0, sizeof to.row);
  for (int i = 0; i < to.rows; ++i) {
    std::memcpy(to.row[i], (const uint8_t*)from + i * stride, to.bytes);
  }
}

static inline void _tile_stream_loadd(int tile, const void* from, int64_t stride) {
  _tile_loadd(tile, from, stride);
}

static inline void _tile_stored(int tile, void* to, int64_t stride) {
  const emulated::Tile& from = emulated::tile_of(tile);
  for (int i = 0; i < from.rows; ++i) {
    std::memcpy((uint8_t*)to + i * stride, from.row[i], from.bytes);
  }
}

static inline void _tile_dpbssd(int to, int left, int right) {
  const emulated::Product p(to, left, right);
  for (int m = 0; m < p.sum.rows; ++m) {
    for (int n = 0; n < p.sum.bytes / 4; ++n) {
      int32_t sum = (int32_t)emulated::group_of(p.sum, m, n);
      for (int k = 0; k < p.b.rows; ++k) {
        sum = emulated::add_products(sum, (const int8_t*)p.a.row[m] + 4 * k,
                                     (const int8_t*)p.b.row[k] + 4 * n);
      }
      std::memcpy(p.sum.row[m] + 4 * n, &sum, 4);
    }
  }
}

// Sums of the even and of the odd elements, which are then added, and that to the tile.
static inline void _tile_dpbf16ps(int to, int left, int right) {
  using namespace emulated;
  const Product p(to, left, right);
  for (int m = 0; m < p.sum.rows; ++m) {
    for (int n = 0; n < p.sum.bytes / 4; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < p.b.rows; ++k) {
        const uint32_t a = group_of(p.a, m, k), b = group_of(p.b, k, n);
        even = add_product(even, low_bf16(a), low_bf16(b));
        odd = add_product(odd, high_bf16(a), high_bf16(b));
      }
      const float before = flushed(bits_of<float>(group_of(p.sum, m, n)));
      const float sum = flushed(before + flushed(even + odd));
      std::memcpy(p.sum.row[m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace gen_fast
