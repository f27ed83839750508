// Products of rows and weights of 8 bits, and those weights as a matrix; kernels/qlinear/int8.py has
// their layout. A task takes some outputs for some rows: it brings the weights to the second-level
// cache as the product reads them, and multiplies in register tiles. Sums are exact, in 32 bits.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/qlinear_int8.cpp"
#define GEN_FAST_WITH_VNNI
#include <memory>
#include <type_traits>
#include <vector>

#include "common/aligned.h"
#include "cpu/ops.h"
#include "common/each_isa.h"

namespace gen_fast {

void int8_linear(Dtype dtype, const Int8Arguments& arguments) {
  GEN_FAST_DISPATCH(int8_linear)(dtype == Dtype::bf16, arguments);
}

void int8_weight(Dtype dtype, const int8_t* blocks, const float* scales, void* weight, int64_t in,
                 int64_t out) {
  GEN_FAST_DISPATCH(int8_weight)(dtype == Dtype::bf16, blocks, scales, weight, in, out);
}

}  // namespace gen_fast

#else
#include "common/vector.h"
#include "common/product.h"
#include "common/quantize.h"

namespace gen_fast::GEN_FAST_ISA {

constexpr int OUTPUTS = 16, INPUTS = 4;  // of a block
// A task: outputs in whole register tiles, and rows that pay for bringing their weights.
constexpr int64_t TASK_OUTPUTS = W == 16 ? 64 : 32, TASK_ROWS = 252;

static inline vi splat(int32_t x) { return x - vi{}; }

// Whole numbers: as many inputs as fill 32 bits lie side by side.
template <class Value>
struct Packed {
  typedef Value type;
  typedef vi sums;
  static constexpr int pair = 4 / sizeof(Value);
  static inline vi splat_at(const Value* p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return splat(bits);
  }
};

#if defined(GEN_FAST_BYTE_DOT)

// Bytes, of which the instruction takes the weights' without a sign: 128 is added to them, and 128
// times the sum of a row is taken from its results.
struct IntOperand : Packed<int8_t> {
  static constexpr int32_t OFFSET = 128;
  static inline vi multiply_add(vi c, vi a, const int8_t* b) {
#if GEN_FAST_VECTOR_BYTES == 64
    return (vi)_mm512_dpbusd_epi32((__m512i)c, _mm512_loadu_si512(b), (__m512i)a);
#else
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)c, _mm256_loadu_si256((const __m256i*)b),
                                       (__m256i)a);
#endif
  }
};

static inline void put(const int8_t* bytes, int8_t* to, int64_t) {
  store((int32_t*)to, load((const int32_t*)bytes) ^ splat((int32_t)0x80808080));
}

#else

// Pairs of 16 bits: the products of bytes that AVX2 has without VNNI saturate.
struct IntOperand : Packed<int16_t> {
  static constexpr int32_t OFFSET = 0;
  static inline vi multiply_add(vi c, vi a, const int16_t* b) {
    vi two;
    std::memcpy(&two, b, sizeof two);
#if GEN_FAST_VECTOR_BYTES == 32
    return c + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)two);
#elif defined(__x86_64__)
    return c + (vi)_mm_madd_epi16((__m128i)a, (__m128i)two);
#else
    return c + (a << 16 >> 16) * (two << 16 >> 16) + (a >> 16) * (two >> 16);
#endif
  }
};

// Four inputs of W outputs, as two pairs; `columns` outputs lie between one pair and the next.
static inline void put(const int8_t* bytes, int16_t* to, int64_t columns) {
  vi x;
  std::memcpy(&x, bytes, sizeof x);
  const vi first = (x << 24 >> 24 & 0xffff) | x << 16 >> 24 << 16;
  const vi second = (x << 8 >> 24 & 0xffff) | x >> 24 << 16;
  std::memcpy(to, &first, sizeof first);
  std::memcpy(to + 2 * columns, &second, sizeof second);
}

#endif

// The weights of `count` outputs as [in / pair][TASK_OUTPUTS][pair].
static void put_weights(const int8_t* blocks, IntOperand::type* to, int64_t in, int64_t count) {
  for (int64_t first = 0; first < count; first += OUTPUTS) {
    for (int64_t k = 0; k < in; k += INPUTS, blocks += OUTPUTS * INPUTS) {
      for (int i = 0; i < OUTPUTS; i += W) {
        put(blocks + i * INPUTS, to + k * TASK_OUTPUTS + (first + i) * IntOperand::pair,
            TASK_OUTPUTS);
      }
    }
  }
}

// The rows as the product takes them, and what is to be taken from the results of each.
struct Rows {
  explicit Rows(const Int8Arguments& a) : at(nullptr), offsets(new int32_t[a.rows]) {
    typedef IntOperand::type Value;
    constexpr bool same = std::is_same_v<Value, int8_t>;
    if constexpr (same) {
      at = reinterpret_cast<const Value*>(a.q);
    } else {
      wide.reset(new Value[a.rows * a.in]);
      at = wide.get();
    }
    parallel_for(a.rows, rows_worth_a_thread(a.in), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int8_t* q = a.q + row * a.in;
        int32_t total = 0;
        for (int64_t k = 0; k < a.in; ++k) {
          if constexpr (same) {
            total += q[k];
          } else {
            wide[row * a.in + k] = q[k];
          }
        }
        offsets[row] = IntOperand::OFFSET * total;
      }
    });
  }
  const IntOperand::type* at;
  std::unique_ptr<int32_t[]> offsets;
  std::unique_ptr<IntOperand::type[]> wide;
};

template <class T>
static void linear(const Int8Arguments& a) {
  typedef IntOperand::type Value;
  const Rows rows(a);
  const int64_t panels = (a.out + TASK_OUTPUTS - 1) / TASK_OUTPUTS;
  const int64_t parts = (a.rows + TASK_ROWS - 1) / TASK_ROWS;
  parallel_tasks(panels * parts, a.in * a.out, [&](int64_t task) {
    static thread_local LineVector<Value> weights;
    weights.resize(a.in * TASK_OUTPUTS);
    const int64_t first = task % panels * TASK_OUTPUTS;
    const int64_t count = a.out - first < TASK_OUTPUTS ? a.out - first : TASK_OUTPUTS;
    put_weights(a.blocks + first * a.in, weights.data(), a.in, count);
    const int64_t end = (task / panels + 1) * TASK_ROWS < a.rows ? (task / panels + 1) * TASK_ROWS
                                                                 : a.rows;
    for (int64_t row = task / panels * TASK_ROWS; row < end; row += ROWS) {
      const int64_t n = end - row < ROWS ? end - row : ROWS;
      int32_t sums[ROWS * TASK_OUTPUTS];
      with_rows(n, [&](auto n) {
        product<IntOperand, n, false>(rows.at + row * a.in, a.in, weights.data(), TASK_OUTPUTS,
                                      count, a.in, sums, TASK_OUTPUTS);
      });
      for (int64_t r = 0; r < n; ++r) {
        T* y = (T*)a.y + (row + r) * a.out + first;
        for (int64_t i = 0; i < count; i += W) {
          const vi sum = load(sums + r * TASK_OUTPUTS + i) - splat(rows.offsets[row + r]);
          vf value = __builtin_convertvector(sum, vf) * a.scales[row + r];
          value *= load(a.weight_scales + first + i);
          if (a.bias) value += load((const T*)a.bias + first + i);
          store(y + i, value);
        }
      }
    }
  });
}

static void int8_linear(bool is_bf16, const Int8Arguments& arguments) {
  is_bf16 ? linear<bf16>(arguments) : linear<float>(arguments);
}

// One output of a panel of blocks, as a row [in].
template <class T>
static void put_row(const int8_t* panel, int64_t output, float scale, float* row, T* to,
                    int64_t in) {
  for (int64_t k = 0; k < in; k += INPUTS) {
    const int8_t* bytes = panel + k * OUTPUTS + output * INPUTS;
    for (int64_t i = 0; i < INPUTS; ++i) row[k + i] = bytes[i];
  }
  scale *= rotate(row, in);
  int64_t k = 0;
  for (; k + W <= in; k += W) store(to + k, load(row + k) * scale);
  for (; k < in; ++k) assign(to + k, row[k] * scale);
}

template <class T>
static void weight_of(const int8_t* blocks, const float* scales, T* weight, int64_t in,
                      int64_t out) {
  parallel_for(out, rows_worth_a_thread(in), [&](int64_t begin, int64_t end) {
    std::vector<float> row(in);
    for (int64_t i = begin; i < end; ++i) {
      put_row(blocks + i / OUTPUTS * OUTPUTS * in, i % OUTPUTS, scales[i], row.data(),
              weight + i * in, in);
    }
  });
}

static void int8_weight(bool is_bf16, const int8_t* blocks, const float* scales, void* weight,
                        int64_t in, int64_t out) {
  is_bf16 ? weight_of(blocks, scales, (bf16*)weight, in, out)
          : weight_of(blocks, scales, (float*)weight, in, out);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
