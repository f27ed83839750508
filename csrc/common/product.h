// Small matrix products in registers, for attention. Included once for each instruction set, after
// vector.h.

namespace gen_fast::GEN_FAST_ISA {

#if defined(GEN_FAST_TILES)
constexpr bool TILES = true;
constexpr int ROWS = 16;  // rows of a tile
constexpr int STEP = 32;  // bfloat16 of a row of one: depths are multiples of this
#else
constexpr bool TILES = false;
constexpr int ROWS = 6;  // rows of a register tile
constexpr int STEP = 2;
#endif
// ROWS × VECTORS accumulators and a few operands fill the 32 registers of AVX-512, 16 otherwise.
constexpr int VECTORS = W == 16 ? 4 : 2;

// How the operands of a product are stored, and what their sums are: float, pairs of bfloat16 for
// the dot instruction, or pairs of integers.
struct FloatOperand {
  typedef float type;
  typedef vf sums;
  static constexpr int pair = 1;
  static inline vf splat_at(const float* p) { return splat(*p); }
  static inline vf multiply_add(vf c, vf a, const float* b) { return c + a * load(b); }
};

#if defined(GEN_FAST_BF16_DOT)
struct PairOperand {
  typedef bf16 type;
  typedef vf sums;
  static constexpr int pair = 2;
  static inline vf splat_at(const bf16* p) {
    int32_t two;
    std::memcpy(&two, p, 4);
    return (vf)_mm512_set1_epi32(two);
  }
  static inline vf multiply_add(vf c, vf a, const bf16* b) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)_mm512_loadu_si512(b));
  }
};
#endif

// The type of an element of the result.
template <class Op>
using Sum = std::conditional_t<std::is_same_v<typename Op::sums, vf>, float, int32_t>;

// c [M, N · W] (+)= a [M, depth] · b, b stored as [depth / pair][columns][pair]. Element (i, k) of
// a is at i · lda + k · step: step 1 for rows, or the width of a matrix stored as b is, to take its
// transpose (then lda is pair).
template <class Op, int M, int N, bool accumulate, int step = 1>
static inline void tile(const typename Op::type* a, int64_t lda, const typename Op::type* b,
                        int64_t columns, int64_t depth, Sum<Op>* c, int64_t ldc) {
  typedef typename Op::sums sums;
  sums acc[M][N];
  unrolled<M>([&](auto i) INLINE {
    unrolled<N>([&](auto j) INLINE {
      acc[i][j] = accumulate ? load(c + i * ldc + j * W) : sums{};
    });
  });
  for (int64_t k = 0; k < depth; k += Op::pair) {
    const typename Op::type* row = b + k * columns;
    unrolled<M>([&](auto i) INLINE {
      const sums left = Op::splat_at(a + i * lda + k * step);
      unrolled<N>([&](auto j) INLINE {
        acc[i][j] = Op::multiply_add(acc[i][j], left, row + j * W * Op::pair);
      });
    });
  }
  unrolled<M>([&](auto i) INLINE {
    unrolled<N>([&](auto j) INLINE { store(c + i * ldc + j * W, acc[i][j]); });
  });
}

// The first `count` columns of b, whole vectors of them.
template <class Op, int M, bool accumulate, int step = 1>
static inline void product(const typename Op::type* a, int64_t lda, const typename Op::type* b,
                           int64_t columns, int64_t count, int64_t depth, Sum<Op>* c,
                           int64_t ldc) {
  int64_t j = 0;
  for (; j + VECTORS * W <= count; j += VECTORS * W) {
    tile<Op, M, VECTORS, accumulate, step>(a, lda, b + j * Op::pair, columns, depth, c + j, ldc);
  }
  for (; j < count; j += W) {
    tile<Op, M, 1, accumulate, step>(a, lda, b + j * Op::pair, columns, depth, c + j, ldc);
  }
}

#if defined(GEN_FAST_TILES)

// The calling thread's tiles while this lives: 16 rows of 64 bytes each. None stay configured for
// what runs next on the thread: oneDNN has a configuration of its own.
struct Tiles {
  Tiles() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Configuration) == 64);
    static constexpr Configuration configuration{};
    _tile_loadconfig(&configuration);
  }
  ~Tiles() { _tile_release(); }
};

// c [16, N · 16] (+)= a [16, depth] · b, in whole tiles. Tiles 0 to 3 are sums, 4 is of a and 5 to 7
// are of b: an instruction names its tiles. A tile of a serves N products, so that loading takes less
// time (8 cycles a tile) than multiplying (16).
template <int N, bool accumulate>
static inline void tile(const bf16* a, int64_t lda, const bf16* b, int64_t columns, int64_t depth,
                        float* c, int64_t ldc) {
  // GCC does not know that loads of tiles read memory: what was stored has to be there by now.
  asm volatile("" ::: "memory");
  if constexpr (accumulate) {
    _tile_loadd(0, c, ldc * 4);
    if constexpr (N > 1) _tile_loadd(1, c + 16, ldc * 4);
    if constexpr (N > 2) _tile_loadd(2, c + 32, ldc * 4);
    if constexpr (N > 3) _tile_loadd(3, c + 48, ldc * 4);
  } else {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) _tile_zero(2);
    if constexpr (N > 3) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += STEP) {
    const bf16* row = b + k * columns;
    _tile_loadd(4, a + k, lda * 2);
    _tile_loadd(5, row, columns * 4);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N > 1) {
      _tile_loadd(6, row + 32, columns * 4);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (N > 2) {
      _tile_loadd(7, row + 64, columns * 4);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (N > 3) {
      _tile_loadd(5, row + 96, columns * 4);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, c, ldc * 4);
  if constexpr (N > 1) _tile_stored(1, c + 16, ldc * 4);
  if constexpr (N > 2) _tile_stored(2, c + 32, ldc * 4);
  if constexpr (N > 3) _tile_stored(3, c + 48, ldc * 4);
}

// Always 16 rows of a and c: those beyond the `Count` that matter are any numbers, NaN too, because a
// row of c depends on no other row of a. `count` rounded up to 16 columns.
template <class Op, class Count, bool accumulate>
static inline void product(const bf16* a, int64_t lda, const bf16* b, int64_t columns,
                           int64_t count, int64_t depth, float* c, int64_t ldc) {
  static_assert(std::is_same_v<Op, PairOperand>);
  int64_t j = 0;
  for (; j + 48 < count; j += 64) {
    tile<4, accumulate>(a, lda, b + j * 2, columns, depth, c + j, ldc);
  }
  if (j + 32 < count) {
    tile<3, accumulate>(a, lda, b + j * 2, columns, depth, c + j, ldc);
  } else if (j + 16 < count) {
    tile<2, accumulate>(a, lda, b + j * 2, columns, depth, c + j, ldc);
  } else if (j < count) {
    tile<1, accumulate>(a, lda, b + j * 2, columns, depth, c + j, ldc);
  }
}

// Calls body with `n`, from 1 to ROWS: a tile has them all, so that none needs code of its own.
template <class Body>
static inline void with_rows(int64_t n, const Body& body) {
  body((int)n);
}

#else

struct Tiles {};  // registers need no configuration

template <class Op, class Count, bool accumulate>
static inline void product(const typename Op::type* a, int64_t lda, const typename Op::type* b,
                           int64_t columns, int64_t count, int64_t depth, Sum<Op>* c,
                           int64_t ldc) {
  product<Op, Count::value, accumulate>(a, lda, b, columns, count, depth, c, ldc);
}

// Calls body with `n`, from 1 to ROWS, as a constant.
template <class Body>
static inline void with_rows(int64_t n, const Body& body) {
  switch (n) {
    case 6: return body(std::integral_constant<int, 6>());
    case 5: return body(std::integral_constant<int, 5>());
    case 4: return body(std::integral_constant<int, 4>());
    case 3: return body(std::integral_constant<int, 3>());
    case 2: return body(std::integral_constant<int, 2>());
    case 1: return body(std::integral_constant<int, 1>());
  }
}

#endif

template <class Out, class In>
static inline void copy_row(Out* to, const In* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) assign(to + i, to_float(from[i]));
}

static inline void copy_row(bf16* to, const bf16* from, int64_t n) {
  std::memcpy(to, from, n * sizeof(bf16));
}

static inline void copy_row(float* to, const float* from, int64_t n) {
  std::memcpy(to, from, n * sizeof(float));
}

}  // namespace gen_fast::GEN_FAST_ISA
