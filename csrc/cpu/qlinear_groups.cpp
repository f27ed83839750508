// Products with weights in groups, and those weights as a matrix; kernels/qlinear/groups.py has
// their layout. A task takes some outputs for all rows: it brings the weights of a piece of the
// inputs to the second-level cache as numbers, and multiplies all rows by them in register tiles.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/qlinear_groups.cpp"
#include <type_traits>
#include <vector>

#include "common/aligned.h"
#include "cpu/ops.h"
#include "common/each_isa.h"

namespace gen_fast {

void group_linear(Dtype dtype, const GroupArguments& arguments) {
  GEN_FAST_DISPATCH(group_linear)(dtype == Dtype::bf16, arguments);
}

void group_weight(Dtype dtype, int bits, const uint8_t* blocks, void* weight, int64_t in,
                  int64_t out) {
  GEN_FAST_DISPATCH(group_weight)(dtype == Dtype::bf16, bits, blocks, weight, in, out);
}

}  // namespace gen_fast

#else
#include "common/vector.h"
#include "common/product.h"

namespace gen_fast::GEN_FAST_ISA {

constexpr int OUTPUTS = 16, INPUTS = 32;  // of a block
constexpr int PARTS = OUTPUTS / W;  // vectors of a block's outputs
// Outputs of a task: a register tile of AVX-512 or two of the others.
constexpr int64_t TASK = W == 16 ? 64 : 32;
// Inputs at a time: weights for half of a second-level cache, at most.
constexpr int64_t DEPTH = 2048;
constexpr int64_t AHEAD = 8;  // blocks that are asked for before they are needed

// Without the processor's own conversion, which AVX2 need not have: the bits of the half moved to
// where a float has them are 2^112 times too small.
static inline vf from_half(const uint8_t* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  const vu bits = widen(h);
  const vf magnitude = (vf)((bits & 0x7fff) << 13) * 0x1p112f;
  return (vf)((vu)magnitude | (bits & 0x8000) << 16);
}

// How a block holds its weights. unpack: what one input has for each output, as numbers from 0 on.
// put_block: a block as [16][columns][2], for the dot instruction of bfloat16.
template <int size>
struct Format {
  static constexpr int bits = size;
  static constexpr int input_bytes = OUTPUTS * bits / 8;
  static constexpr int block_bytes = 4 * OUTPUTS + INPUTS * input_bytes;
  static inline void unpack(const uint8_t* bytes, vf* q);
#if defined(GEN_FAST_BF16_DOT)
  static inline void put_block(const uint8_t* block, bf16* to, int64_t columns);
#endif
};

// Both without __builtin_convertvector from bytes, which GCC 12 converts one by one.
template <>
inline void Format<4>::unpack(const uint8_t* bytes, vf* q) {
#if GEN_FAST_VECTOR_BYTES == 64
  int64_t eight;
  std::memcpy(&eight, bytes, 8);
  const vu wide = (vu)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_set1_epi64x(eight));
  const vu shift = {0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4};
  q[0] = __builtin_convertvector((vi)((wide >> shift) & 15), vf);
#elif GEN_FAST_VECTOR_BYTES == 32
  const vu wide = (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
  q[0] = __builtin_convertvector((vi)(wide & 15), vf);
  q[1] = __builtin_convertvector((vi)(wide >> 4), vf);
#else
  for (int i = 0; i < OUTPUTS / 2; ++i) {
    q[i / W][i % W] = (float)(bytes[i] & 15);
    q[PARTS / 2 + i / W][i % W] = (float)(bytes[i] >> 4);
  }
#endif
}

template <>
inline void Format<8>::unpack(const uint8_t* bytes, vf* q) {
#if GEN_FAST_VECTOR_BYTES == 64
  const __m128i all = _mm_loadu_si128((const __m128i*)bytes);
  q[0] = __builtin_convertvector((vi)_mm512_maskz_cvtepu8_epi32(0xffff, all), vf);
#elif GEN_FAST_VECTOR_BYTES == 32
  for (int i = 0; i < PARTS; ++i) {
    const __m128i eight = _mm_loadl_epi64((const __m128i*)(bytes + i * W));
    q[i] = __builtin_convertvector((vi)_mm256_cvtepu8_epi32(eight), vf);
  }
#else
  for (int i = 0; i < PARTS; ++i, bytes += W) {
    vf part = {};
    for (int k = 0; k < W; ++k) part[k] = (float)bytes[k];
    q[i] = part;
  }
#endif
}

#if defined(GEN_FAST_BF16_DOT)
// A half for each of 16 outputs: those of the first 8 twice, and those of the others.
static inline void from_halves(const uint8_t* p, vf* first, vf* second) {
  const __m512i all = (__m512i)from_half(p);
  *first = (vf)_mm512_maskz_shuffle_i32x4(0xffff, all, all, 0x44);
  *second = (vf)_mm512_maskz_shuffle_i32x4(0xffff, all, all, 0xee);
}

// The 16 bytes of two inputs are 16 lanes: of their low halves eight outputs of the one and of the
// other, of their high halves the other eight.
template <>
inline void Format<4>::put_block(const uint8_t* block, bf16* to, int64_t columns) {
  const vf numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  alignas(64) static constexpr int16_t PAIRS[] = {0,  8,  1,  9,  2,  10, 3,  11, 4,  12, 5,
                                                  13, 6,  14, 7,  15, 16, 24, 17, 25, 18, 26,
                                                  19, 27, 20, 28, 21, 29, 22, 30, 23, 31};
  const __m512i pairs = _mm512_loadu_si512(PAIRS);
  vf low_scale, high_scale, low_minimum, high_minimum;
  from_halves(block, &low_scale, &high_scale);
  from_halves(block + 2 * OUTPUTS, &low_minimum, &high_minimum);
  const uint8_t* bytes = block + 4 * OUTPUTS;
  for (int k = 0; k < INPUTS; k += 2, bytes += OUTPUTS) {
    const vu q = (vu)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)bytes));
    // Of an index the last four bits count.
    const vf low = (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)q, (__m512)numbers);
    const vf high = (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)(q >> 4), (__m512)numbers);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)(high * high_scale + high_minimum),
                                                      (__m512)(low * low_scale + low_minimum));
    _mm512_storeu_si512(to + k * columns,
                        _mm512_maskz_permutexvar_epi16(0xffffffff, pairs, both));
  }
}

template <>
inline void Format<8>::put_block(const uint8_t* block, bf16* to, int64_t columns) {
  alignas(64) static constexpr int16_t PAIRS[] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                  21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                  11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_loadu_si512(PAIRS);
  const vf scale = from_half(block), minimum = from_half(block + 2 * OUTPUTS);
  const uint8_t* bytes = block + 4 * OUTPUTS;
  for (int k = 0; k < INPUTS; k += 2, bytes += 2 * OUTPUTS) {
    vf first, second;
    unpack(bytes, &first);
    unpack(bytes + OUTPUTS, &second);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)(second * scale + minimum),
                                                      (__m512)(first * scale + minimum));
    _mm512_storeu_si512(to + k * columns,
                        _mm512_maskz_permutexvar_epi16(0xffffffff, pairs, both));
  }
}

template <class Format>
static inline void put_block(const uint8_t* block, bf16* to, int64_t columns) {
  Format::put_block(block, to, columns);
}
#endif

// A block as [32][columns], 16 columns of it.
template <class Format>
static inline void put_block(const uint8_t* block, float* to, int64_t columns) {
  vf scale[PARTS], minimum[PARTS];
  for (int i = 0; i < PARTS; ++i) {
    scale[i] = from_half(block + i * W * 2);
    minimum[i] = from_half(block + 2 * OUTPUTS + i * W * 2);
  }
  const uint8_t* bytes = block + 4 * OUTPUTS;
  for (int k = 0; k < INPUTS; ++k, bytes += Format::input_bytes) {
    vf q[PARTS];
    Format::unpack(bytes, q);
    for (int i = 0; i < PARTS; ++i) store(to + k * columns + i * W, q[i] * scale[i] + minimum[i]);
  }
}

// What a thread works in.
template <class Op>
struct Workspace {
  LineVector<typename Op::type> weights;  // [DEPTH / pair][TASK][pair]
  LineVector<float> sums;                 // [rows][TASK], between one piece of inputs and the next
};

// Inputs [from, from + depth) of `count` outputs as [depth / pair][TASK][pair].
template <class Format, class Value>
static void put_weights(const uint8_t* blocks, Value* weights, int64_t in, int64_t from,
                        int64_t depth, int64_t count) {
  constexpr int64_t BYTES = Format::block_bytes;
  const int64_t panel_outputs = OUTPUTS * sizeof(float) / sizeof(Value);  // a pair an output
  for (int64_t first = 0; first < count; first += OUTPUTS) {
    const uint8_t* block = blocks + (first * in / OUTPUTS + from) / INPUTS * BYTES;
    for (int64_t k = 0; k < depth; k += INPUTS, block += BYTES) {
      // The blocks of other outputs follow.
      for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(block + AHEAD * BYTES + i);
      put_block<Format>(block, weights + k * TASK + first / OUTPUTS * panel_outputs, TASK);
    }
  }
}

template <class Format, class Op, class T>
static void linear(const typename Op::type* x, const uint8_t* blocks, const T* bias, T* y,
                   int64_t rows, int64_t in, int64_t out) {
  parallel_tasks((out + TASK - 1) / TASK, in * out, [&](int64_t task) {
    static thread_local Workspace<Op> work;
    const int64_t first = task * TASK, count = out - first < TASK ? out - first : TASK;
    const int64_t depth = in < DEPTH ? in : DEPTH;
    work.weights.resize(depth * TASK);
    if (in > DEPTH) work.sums.resize(rows * TASK);
    for (int64_t from = 0; from < in; from += depth) {
      const int64_t piece = in - from < depth ? in - from : depth;
      put_weights<Format>(blocks + first / OUTPUTS * (in / INPUTS) * Format::block_bytes,
                          work.weights.data(), in, from, piece, count);
      for (int64_t row = 0; row < rows; row += ROWS) {
        const int64_t n = rows - row < ROWS ? rows - row : ROWS;
        float tile[ROWS * TASK];
        float* sums = in > DEPTH ? work.sums.data() + row * TASK : tile;
        const typename Op::type* left = x + row * in + from;
        with_rows(n, [&](auto n) {
          from == 0 ? product<Op, n, false>(left, in, work.weights.data(), TASK, count, piece, sums,
                                            TASK)
                    : product<Op, n, true>(left, in, work.weights.data(), TASK, count, piece, sums,
                                           TASK);
        });
        if (from + piece < in) continue;
        for (int64_t r = 0; r < n; ++r) {
          for (int64_t i = 0; i < count; i += W) {
            const vf sum = load(sums + r * TASK + i);
            store(y + (row + r) * out + first + i, bias ? sum + load(bias + first + i) : sum);
          }
        }
      }
    }
  });
}

template <class Format>
static void linear_of(bool is_bf16, const GroupArguments& a) {
  if (!is_bf16) {
    return linear<Format, FloatOperand>((const float*)a.x, a.blocks, (const float*)a.bias,
                                        (float*)a.y, a.rows, a.in, a.out);
  }
#if defined(GEN_FAST_BF16_DOT)
  linear<Format, PairOperand>((const bf16*)a.x, a.blocks, (const bf16*)a.bias, (bf16*)a.y, a.rows,
                              a.in, a.out);
#else
  std::vector<float> wide(a.rows * a.in);
  parallel_for(a.rows, rows_worth_a_thread(a.in), [&](int64_t begin, int64_t end) {
    copy_row(wide.data() + begin * a.in, (const bf16*)a.x + begin * a.in, (end - begin) * a.in);
  });
  linear<Format, FloatOperand>(wide.data(), a.blocks, (const bf16*)a.bias, (bf16*)a.y, a.rows,
                               a.in, a.out);
#endif
}

// Calls body with the format of so many bits.
template <class Body>
static inline void with_format(int bits, const Body& body) {
  switch (bits) {
    case 4: return body(Format<4>());
    case 8: return body(Format<8>());
  }
}

static void group_linear(bool is_bf16, const GroupArguments& arguments) {
  with_format(arguments.bits,
              [&](auto format) { linear_of<decltype(format)>(is_bf16, arguments); });
}

// The weights of one block's outputs, as columns of weight [in, out].
template <class Format, class T>
static void put_columns_of(const uint8_t* blocks, T* weight, int64_t in, int64_t out) {
  for (int64_t k = 0; k < in; k += INPUTS, blocks += Format::block_bytes) {
    if constexpr (std::is_same_v<T, float>) {
      put_block<Format>(blocks, weight + k * out, out);
    } else {
      float block[INPUTS * OUTPUTS];
      put_block<Format>(blocks, block, OUTPUTS);
      for (int i = 0; i < INPUTS; ++i) {
        for (int j = 0; j < OUTPUTS; j += W) {
          store(weight + (k + i) * out + j, load(block + i * OUTPUTS + j));
        }
      }
    }
  }
}

template <class Format, class T>
static void weight_of(const uint8_t* blocks, T* weight, int64_t in, int64_t out) {
  parallel_for(out / OUTPUTS, rows_worth_a_thread(OUTPUTS * in), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      put_columns_of<Format>(blocks + panel * (in / INPUTS) * Format::block_bytes,
                             weight + panel * OUTPUTS, in, out);
    }
  });
}

static void group_weight(bool is_bf16, int bits, const uint8_t* blocks, void* weight, int64_t in,
                         int64_t out) {
  with_format(bits, [&](auto format) {
    typedef decltype(format) Format;
    is_bf16 ? weight_of<Format>(blocks, (bf16*)weight, in, out)
            : weight_of<Format>(blocks, (float*)weight, in, out);
  });
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
