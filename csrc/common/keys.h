// What attention and its gradient share: which keys a query sees, which weights are dropped, and how
// keys and values lie for the products. Included once for each instruction set, after product.h and
// philox.h.

namespace gen_fast::GEN_FAST_ISA {

constexpr int KEYS = 64;    // keys in a block
constexpr int CHUNK = 192;  // query rows (tokens times heads of a group) that a task aims at
constexpr float HIDDEN = -1e30f;

static inline int64_t rounded_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Working memory: zeros in the beginning.
#if defined(GEN_FAST_TILES)
// Rows of tiles lie in a cache line each, not in two.
template <class T>
using Memory = LineVector<T>;
#else
template <class T>
using Memory = std::vector<T>;
#endif

static inline int64_t tokens_of_chunk(int64_t group) {
  return CHUNK / group > 0 ? CHUNK / group : 1;
}

// The keys of a block that a query sees: first … last - 1, but not gap … resume - 1. If there are
// none, last is not above first; a gap lies inside, or is empty.
struct Seen {
  int first, last, gap, resume;

  bool any() const { return first < last; }

  // The scores of the other keys, up to `end`.
  void hide(float* scores, int end) const {
    for (int j = 0; j < first; ++j) scores[j] = HIDDEN;
    for (int j = gap; j < resume; ++j) scores[j] = HIDDEN;
    for (int j = last; j < end; ++j) scores[j] = HIDDEN;
  }
};

// The mask of one text. All positions count the prefix.
struct TextMask {
  Mask kind;
  int64_t window;        // 0 for none
  int64_t block, after;  // GEM: the special tokens' first position and the one after the last

  TextMask(const AttentionArguments& args, int64_t text)
      : kind(args.mask), window(args.window), block(0), after(0) {
    if (kind == Mask::gem) {
      block = args.prefix + args.blocks[2 * text];
      after = args.prefix + args.blocks[2 * text + 1];
    }
  }

  // How many of `n` keys, the first of which stands at `start`, the query at `position` can reach.
  int64_t reach(int64_t position, int64_t start, int64_t n) const {
    const int64_t end = position + 1 - start;
    return kind == Mask::bidirectional || end > n ? n : end;
  }

  // `count` keys, the first of which stands at `start`, as the query at `position` sees them.
  Seen seen(int64_t position, int64_t start, int64_t count) const {
    int64_t first = window ? position - window + 1 : 0, gap = 0, resume = 0;
    if (kind == Mask::gem && position >= after) {
      first = block > first ? block : first;
    } else if (kind == Mask::gem && position >= block) {
      gap = block, resume = position;
    }
    const auto clamp = [count](int64_t key) {
      return (int)(key < 0 ? 0 : key > count ? count : key);
    };
    Seen seen{clamp(first - start), clamp(reach(position, start, count)), clamp(gap - start),
              clamp(resume - start)};
    if (seen.gap <= seen.first && seen.first < seen.resume) seen.first = seen.resume;
    if (seen.gap < seen.last && seen.last <= seen.resume) seen.last = seen.gap;
    if (seen.gap <= seen.first || seen.gap >= seen.last) seen.gap = seen.resume = 0;
    return seen;
  }
};

// Dropout of the weights of one text and the heads of a group, for a block of keys at a time.
struct Dropout {
  const Philox& philox;
  uint32_t text_key, c2;  // c2: of the group's first head
  Columns columns[KEYS / (2 * W)];
  uint32_t row_c1[ROWS], row_c2[ROWS];  // of a tile

  Dropout(const Philox& drawn, const AttentionArguments& args, int64_t text, int64_t first_head)
      : philox(drawn),
        text_key((uint32_t)args.text_keys[text]),
        c2((uint32_t)(args.layer << 16 | first_head)) {}

  // Not inlined, here and below: what calls it would save registers for it where nothing is dropped.
  __attribute__((noinline)) void go_to_block(int64_t first_key) {
    for (int i = 0; i < KEYS / (2 * W); ++i) {
      columns[i] = Columns(philox, text_key, (uint32_t)(first_key / 4 + i * (W / 2)));
    }
  }

  // The tile's n rows are those from `row` on of a run of queries, the first at `position`.
  __attribute__((noinline)) void go_to_rows(int64_t n, int64_t row, int64_t position,
                                            int64_t group) {
    for (int64_t r = 0; r < n; ++r, ++row) {
      row_c1[r] = (uint32_t)(position + row / group);
      row_c2[r] = c2 + (uint32_t)(row % group);
    }
  }

  // All bits for each key that row i of the tile keeps, of `count` keys and up to KEYS.
  __attribute__((noinline)) void put_masks(int i, int count, uint32_t* to) const {
    each_mask(philox, columns, Row(philox, row_c1[i], row_c2[i]), count, [to](int j, vu mask) {
      std::memcpy(to + j, &mask, sizeof mask);
    });
  }
};

// Rows `row` (even) and row + 1 of a matrix [n / pair][columns][pair], the right side of a product.
template <class Op, class In>
static inline void put_rows(typename Op::type* to, int64_t row, int64_t columns, const In* first,
                            const In* second, int64_t n) {
  if constexpr (Op::pair == 1) {
    copy_row(to + row * columns, first, n);
    copy_row(to + (row + 1) * columns, second, n);
  } else {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      vh a, b;
      std::memcpy(&a, first + i, sizeof a);
      std::memcpy(&b, second + i, sizeof b);
      const vu both = widen(a) | widen(b) << 16;
      std::memcpy(to + row * columns + i * 2, &both, sizeof both);
    }
    for (; i < n; ++i) {
      to[row * columns + i * 2] = first[i];
      to[row * columns + i * 2 + 1] = second[i];
    }
  }
}

// `count` rows of `from`, keys or values of a block, as such a matrix of whole steps.
template <class Op, class In>
static inline void put_block_of_rows(typename Op::type* to, int64_t columns, const In* from,
                                     int64_t stride, int64_t count, int64_t n) {
  for (int64_t j = 0; j < count; j += 2) {
    // Beside an odd last row itself again: no query gives it weight there.
    const In *row = from + j * stride, *next = j + 1 < count ? row + stride : row;
    put_rows<Op>(to, j, columns, row, next, n);
  }
  if constexpr (TILES) {  // no weight there either, but 0 · NaN, of a text before, is NaN
    const int64_t begin = rounded_up(count, 2), end = rounded_up(count, STEP);
    std::memset((void*)(to + begin * columns), 0, (end - begin) * columns * sizeof *to);
  }
}

// `count` rows of `from`, at most KEYS, transposed: [n / pair][KEYS][pair], n rounded up to pairs.
// Missing columns are zero.
template <class Op, class In>
static inline void put_columns(typename Op::type* to, const In* from, int64_t stride, int64_t count,
                               int64_t n) {
  constexpr int pair = Op::pair;
  for (int64_t j = 0; j < count; ++j) {
    const In* row = from + j * stride;
    for (int64_t i = 0; i < n; i += pair) {
      copy_row(to + i * KEYS + j * pair, row + i, n - i < pair ? n - i : pair);
    }
    if (n % pair) to[(n - 1) * KEYS + j * pair + 1] = {};
  }
  for (int64_t i = 0; i < n; i += pair) {
    std::memset((void*)(to + i * KEYS + count * pair), 0, (KEYS - count) * pair * sizeof *to);
  }
}

#if defined(GEN_FAST_BF16_DOT)
// rows[i][j] becomes rows[j][i]: in 4 × 4 tiles of 32 bits, then tiles in their places.
static inline void transpose(__m512i* rows) {
  constexpr __mmask16 ALL = 0xffff;  // GCC 12 warns of its own unmasked forms
  __m512i half[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_maskz_unpacklo_epi32(ALL, rows[i], rows[i + 1]);
    const __m512i b = _mm512_maskz_unpackhi_epi32(ALL, rows[i], rows[i + 1]);
    const __m512i c = _mm512_maskz_unpacklo_epi32(ALL, rows[i + 2], rows[i + 3]);
    const __m512i d = _mm512_maskz_unpackhi_epi32(ALL, rows[i + 2], rows[i + 3]);
    half[i] = _mm512_maskz_unpacklo_epi64(0xff, a, c);
    half[i + 1] = _mm512_maskz_unpackhi_epi64(0xff, a, c);
    half[i + 2] = _mm512_maskz_unpacklo_epi64(0xff, b, d);
    half[i + 3] = _mm512_maskz_unpackhi_epi64(0xff, b, d);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i even_a = _mm512_maskz_shuffle_i32x4(ALL, half[i], half[i + 4], 0x88);
    const __m512i even_b = _mm512_maskz_shuffle_i32x4(ALL, half[i + 8], half[i + 12], 0x88);
    const __m512i odd_a = _mm512_maskz_shuffle_i32x4(ALL, half[i], half[i + 4], 0xdd);
    const __m512i odd_b = _mm512_maskz_shuffle_i32x4(ALL, half[i + 8], half[i + 12], 0xdd);
    rows[i] = _mm512_maskz_shuffle_i32x4(ALL, even_a, even_b, 0x88);
    rows[i + 4] = _mm512_maskz_shuffle_i32x4(ALL, odd_a, odd_b, 0x88);
    rows[i + 8] = _mm512_maskz_shuffle_i32x4(ALL, even_a, even_b, 0xdd);
    rows[i + 12] = _mm512_maskz_shuffle_i32x4(ALL, odd_a, odd_b, 0xdd);
  }
}

// Rows of 32-bit units, floats or pairs of bfloat16: 16 × 16 of them in registers.
static inline void put_columns_of_units(void* to, const void* from, int64_t stride_bytes,
                                        int64_t count, int64_t units) {
  for (int64_t i = 0; i < units; i += 16) {
    const int64_t n = units - i < 16 ? units - i : 16;
    const __mmask16 mask = (__mmask16)(0xffff >> (16 - n));
    for (int64_t j = 0; j < (TILES ? count : KEYS); j += 16) {  // tiles read no columns beyond
      __m512i rows[16];
      for (int r = 0; r < 16; ++r) {
        const char* row = (const char*)from + (j + r) * stride_bytes + i * 4;
        rows[r] = j + r < count ? _mm512_maskz_loadu_epi32(mask, row) : __m512i{};
      }
      transpose(rows);
      for (int64_t r = 0; r < n; ++r) {
        std::memcpy((int32_t*)to + (i + r) * KEYS + j, &rows[r], sizeof rows[r]);
      }
    }
  }
}

#if defined(GEN_FAST_TILES)
// `count` rows of `from` transposed, [n, to_stride]: the left side of a product. n is in whole vectors;
// the columns of `to` are in whole steps, and those beyond `count` zero.
static inline void put_transposed(bf16* to, int64_t to_stride, const bf16* from, int64_t stride,
                                  int64_t count, int64_t n) {
  for (int64_t j = 0; j < count; j += STEP) {
    for (int64_t i = 0; i < n; i += W) {
      __m512i pairs[16];  // of rows: what is then turned are units of 32 bits
      for (int64_t r = 0; r < STEP; r += 2) {
        vh first = {}, second = {};
        const bf16* row = from + (j + r) * stride + i;
        if (j + r < count) std::memcpy(&first, row, sizeof first);
        if (j + r + 1 < count) std::memcpy(&second, row + stride, sizeof second);
        pairs[r / 2] = (__m512i)(widen(first) | widen(second) << 16);
      }
      transpose(pairs);
      for (int64_t c = 0; c < W; ++c) {
        std::memcpy(to + (i + c) * to_stride + j, &pairs[c], sizeof pairs[c]);
      }
    }
  }
}
#endif

template <>
inline void put_columns<FloatOperand, float>(float* to, const float* from, int64_t stride,
                                             int64_t count, int64_t n) {
  put_columns_of_units(to, from, stride * 4, count, n);
}

template <>
inline void put_columns<PairOperand, bf16>(bf16* to, const bf16* from, int64_t stride,
                                           int64_t count, int64_t n) {
  put_columns_of_units(to, from, stride * 2, count, n / 2);
  if (n % 2 == 0) return;
  for (int64_t j = 0; j < KEYS; ++j) {
    to[(n - 1) * KEYS + 2 * j] = j < count ? from[j * stride + n - 1] : bf16{};
    to[(n - 1) * KEYS + 2 * j + 1] = {};
  }
}
#endif

}  // namespace gen_fast::GEN_FAST_ISA
