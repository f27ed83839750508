// Philox4x32-10, the generator behind dropout, on vectors of counters. Included once for each
// instruction set, after vector.h. Source: Salmon et al., SC'11, §3.3; kernels/dropout/philox.py
// is the same in Python.
//
// A word lies in the low half of a lane of 64 bits, where a multiplication leaves the high and the
// low word that a round needs; upper halves hold what nothing reads.

namespace gen_fast::GEN_FAST_ISA {

typedef uint64_t vl __attribute__((vector_size(GEN_FAST_VECTOR_BYTES)));
constexpr int COUNTERS = W / 2;  // in a vector, which makes 4 · COUNTERS = 2 · W words
constexpr int PHILOX_ROUNDS = 10;
constexpr uint32_t PHILOX_A = 0xD2511F53, PHILOX_B = 0xCD9E8D57;

static inline vl splat_lanes(uint64_t x) { return x - vl{}; }

// multiply_low: the product of the low halves, all 64 bits of it. even_lanes and odd_lanes: those of
// a and b in turns.
#if GEN_FAST_VECTOR_BYTES == 64
static inline vl multiply_low(vl a, vl b) {
  return (vl)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
}
static inline vl even_lanes(vl a, vl b) {
  return (vl)_mm512_maskz_unpacklo_epi64(0xff, (__m512i)a, (__m512i)b);
}
static inline vl odd_lanes(vl a, vl b) {
  return (vl)_mm512_maskz_unpackhi_epi64(0xff, (__m512i)a, (__m512i)b);
}
#elif GEN_FAST_VECTOR_BYTES == 32
static inline vl multiply_low(vl a, vl b) { return (vl)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
static inline vl even_lanes(vl a, vl b) {
  return (vl)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
}
static inline vl odd_lanes(vl a, vl b) { return (vl)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b); }
#else
#if defined(__x86_64__)
static inline vl multiply_low(vl a, vl b) { return (vl)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
static inline vl multiply_low(vl a, vl b) { return (a & 0xffffffff) * (b & 0xffffffff); }
#endif
static inline vl even_lanes(vl a, vl b) { return vl{a[0], b[0]}; }
static inline vl odd_lanes(vl a, vl b) { return vl{a[1], b[1]}; }
#endif

// What is drawn with: the keys of the rounds, and the first word that is kept.
struct Philox {
  vl k0[PHILOX_ROUNDS], k1[PHILOX_ROUNDS];
  uint32_t first_kept;

  Philox(uint64_t seed, uint32_t first) : first_kept(first) {
    for (int r = 0; r < PHILOX_ROUNDS; ++r) {
      k0[r] = splat_lanes((uint32_t)seed + r * 0x9E3779B9u);
      k1[r] = splat_lanes((uint32_t)(seed >> 32) + r * 0xBB67AE85u);
    }
  }
};

struct Counters {
  vl c0, c1, c2, c3;

  void round(const Philox& philox, int r) {
    const vl first = multiply_low(c0, splat_lanes(PHILOX_A));
    const vl second = multiply_low(c2, splat_lanes(PHILOX_B));
    c0 = second >> 32 ^ c1 ^ philox.k0[r];
    c2 = first >> 32 ^ c3 ^ philox.k1[r];
    c1 = second;
    c3 = first;
  }
};

// 2 · W columns of one text after the first two rounds, as far as they do not depend on the row:
// c0 is counted from the column and c3 is the text's key, while c1 and c2 are of the row.
struct Columns {
  vl c0, c1, c2;

  Columns() = default;

  // From the column 4 · counter on.
  Columns(const Philox& philox, uint32_t text_key, uint32_t counter) {
    vl number;  // even lanes first, as `masks` takes them
    for (int i = 0; i < COUNTERS; ++i) number[i] = counter + i / 2 + i % 2 * (COUNTERS / 2);
    const vl first = multiply_low(number, splat_lanes(PHILOX_A));
    const vl third = first >> 32 ^ splat_lanes(text_key) ^ philox.k1[0];
    const vl second = multiply_low(third, splat_lanes(PHILOX_B));
    c0 = second >> 32 ^ philox.k0[1];
    c1 = second;
    c2 = first ^ philox.k1[1];
  }
};

// The other share of the first two rounds: a row's.
struct Row {
  uint32_t c0, c2, c3;

  Row(const Philox& philox, uint32_t row_c1, uint32_t row_c2) {
    const uint64_t second = (uint64_t)row_c2 * PHILOX_B;
    const uint32_t mixed = (uint32_t)(second >> 32) ^ row_c1 ^ (uint32_t)philox.k0[0][0];
    const uint64_t first = (uint64_t)mixed * PHILOX_A;
    c0 = (uint32_t)second;
    c2 = (uint32_t)(first >> 32);
    c3 = (uint32_t)first;
  }

  Counters meet(const Columns& columns) const {
    return {columns.c0 ^ splat_lanes(c0), columns.c1, columns.c2 ^ splat_lanes(c2),
            splat_lanes(c3)};
  }
};

// Of the words of finished counters, in the order of the columns: all bits where one is kept.
static inline void masks(const Counters& c, uint32_t first_kept, vu& low, vu& high) {
  const vl even = (c.c0 & 0xffffffff) | c.c1 << 32, odd = (c.c2 & 0xffffffff) | c.c3 << 32;
  low = (vu)((vu)even_lanes(even, odd) >= first_kept);
  high = (vu)((vu)odd_lanes(even, odd) >= first_kept);
}

// Calls use(j, mask) for the W columns from j on, until `count` columns have been had. columns:
// 2 · W of them each, an even number of these.
template <class Use>
static inline void each_mask(const Philox& philox, const Columns* columns, const Row& row,
                             int count, const Use& use) {
  vu low, high;
  for (int j = 0; j < count; j += 4 * W, columns += 2) {
    // Two at a time: a round waits for the products of the one before.
    Counters a = row.meet(columns[0]), b = row.meet(columns[1]);
    for (int r = 2; r < PHILOX_ROUNDS; ++r) a.round(philox, r), b.round(philox, r);
    masks(a, philox.first_kept, low, high);
    use(j, low), use(j + W, high);
    masks(b, philox.first_kept, low, high);
    use(j + 2 * W, low), use(j + 3 * W, high);
  }
}

// x where all bits of the mask are set, else 0.
static inline vf keep(vf x, vu mask) { return (vf)((vu)x & mask); }

static inline vf keep(vf x, const uint32_t* masks) {
  vu mask;
  std::memcpy(&mask, masks, sizeof mask);
  return keep(x, mask);
}

}  // namespace gen_fast::GEN_FAST_ISA
