// Products with weights of 4 bits, and those weights as a matrix; kernels/qlinear/int4.py has their
// layout. A task takes some outputs for all rows: it brings the weights of a piece of the inputs to
// the second-level cache as numbers, and multiplies all rows by them in register tiles.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/qlinear_int4.cpp"
#include <type_traits>
#include <vector>

#include "cpu/ops.h"
#include "common/each_isa.h"

namespace gen_fast {

void int4_linear(Dtype dtype, const void* x, const uint8_t* blocks, const void* bias, void* y,
                 int64_t rows, int64_t in, int64_t out) {
  GEN_FAST_DISPATCH(int4_linear)(dtype == Dtype::bf16, x, blocks, bias, y, rows, in, out);
}

void int4_weight(Dtype dtype, const uint8_t* blocks, void* weight, int64_t in, int64_t out) {
  GEN_FAST_DISPATCH(int4_weight)(dtype == Dtype::bf16, blocks, weight, in, out);
}

}  // namespace gen_fast

#else
#include "common/vector.h"
#include "common/product.h"

namespace gen_fast::GEN_FAST_ISA {

constexpr int OUTPUTS = 16, INPUTS = 32;  // of a block
constexpr int BLOCK_BYTES = 4 * OUTPUTS + OUTPUTS * INPUTS / 2;
constexpr int PARTS = OUTPUTS / W;  // vectors of a block's outputs
// Outputs of a task: a register tile of AVX-512 or two of the others.
constexpr int64_t TASK = W == 16 ? 64 : 32;
// Inputs at a time: 64 KB of weights.
constexpr int64_t DEPTH = 16384 / TASK;

// Without the processor's own conversion, which AVX2 need not have: the bits of the half moved to
// where a float has them are 2^112 times too small.
static inline vf from_half(const uint8_t* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  const vu bits = widen(h);
  const vf magnitude = (vf)((bits & 0x7fff) << 13) * 0x1p112f;
  return (vf)((vu)magnitude | (bits & 0x8000) << 16);
}

// What one input of a block has for each output, 0 to 15. GCC 12 converts bytes one by one.
static inline void unpack(const uint8_t* bytes, vf* q) {
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

// A block as [32 / pair][columns][pair], 16 columns of it.
template <class Op>
static inline void put_block(const uint8_t* block, typename Op::type* to, int64_t columns) {
  vf scale[PARTS], minimum[PARTS];
  for (int i = 0; i < PARTS; ++i) {
    scale[i] = from_half(block + i * W * 2);
    minimum[i] = from_half(block + 2 * OUTPUTS + i * W * 2);
  }
  const uint8_t* bytes = block + 4 * OUTPUTS;
  for (int k = 0; k < INPUTS; k += Op::pair) {
    vf q[Op::pair][PARTS];
    for (int j = 0; j < Op::pair; ++j) unpack(bytes + (k + j) * OUTPUTS / 2, q[j]);
    for (int i = 0; i < PARTS; ++i) {
      const vf first = q[0][i] * scale[i] + minimum[i];
      if constexpr (Op::pair == 1) {
        store(to + k * columns + i * W, first);
      } else {
        const vf second = q[1][i] * scale[i] + minimum[i];
        const vu both = widen(to_bf16(first)) | widen(to_bf16(second)) << 16;
        std::memcpy(to + k * columns + i * W * 2, &both, sizeof both);
      }
    }
  }
}

// What a thread works in.
template <class Op>
struct Workspace {
  std::vector<typename Op::type> weights;  // [DEPTH / pair][TASK][pair]
  std::vector<float> sums;                 // [rows][TASK], where they are not the result
};

// Adds the products of x [rows, in] with `count` outputs to sums, rows of which are `stride` apart.
template <class Op>
static void multiply(const typename Op::type* x, const uint8_t* blocks, typename Op::type* weights,
                     float* sums, int64_t stride, int64_t rows, int64_t in, int64_t count) {
  const int64_t groups = in / INPUTS;
  for (int64_t from = 0; from < in; from += DEPTH) {
    const int64_t depth = in - from < DEPTH ? in - from : DEPTH;
    for (int64_t panel = 0; panel < count / OUTPUTS; ++panel) {
      const uint8_t* block = blocks + (panel * groups + from / INPUTS) * BLOCK_BYTES;
      for (int64_t k = 0; k < depth; k += INPUTS, block += BLOCK_BYTES) {
        put_block<Op>(block, weights + k * TASK + panel * OUTPUTS * Op::pair, TASK);
      }
    }
    for (int64_t row = 0; row < rows; row += ROWS) {
      with_rows(rows - row < ROWS ? rows - row : ROWS, [&](auto n) {
        product<Op, n, true>(x + row * in + from, in, weights, TASK, count, depth,
                             sums + row * stride, stride);
      });
    }
  }
}

template <class Op, class T>
static void linear(const typename Op::type* x, const uint8_t* blocks, const T* bias, T* y,
                   int64_t rows, int64_t in, int64_t out) {
  parallel_tasks((out + TASK - 1) / TASK, in * out, [&](int64_t task) {
    static thread_local Workspace<Op> work;
    const int64_t first = task * TASK, count = out - first < TASK ? out - first : TASK;
    float* sums;
    int64_t stride;
    if constexpr (std::is_same_v<T, float>) {
      sums = y + first;
      stride = out;
    } else {
      work.sums.resize(rows * TASK);
      sums = work.sums.data();
      stride = TASK;
    }
    work.weights.resize(DEPTH * TASK);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < count; i += W) {
        store(sums + row * stride + i, bias ? load(bias + first + i) : vf{});
      }
    }
    multiply<Op>(x, blocks + first / OUTPUTS * (in / INPUTS) * BLOCK_BYTES, work.weights.data(),
                 sums, stride, rows, in, count);
    if constexpr (!std::is_same_v<T, float>) {
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < count; i += W) {
          store(y + row * out + first + i, load(sums + row * TASK + i));
        }
      }
    }
  });
}

static void int4_linear(bool is_bf16, const void* x, const uint8_t* blocks, const void* bias,
                        void* y, int64_t rows, int64_t in, int64_t out) {
  if (!is_bf16) {
    return linear<FloatOperand>((const float*)x, blocks, (const float*)bias, (float*)y, rows, in,
                                out);
  }
#if defined(GEN_FAST_BF16_DOT)
  linear<PairOperand>((const bf16*)x, blocks, (const bf16*)bias, (bf16*)y, rows, in, out);
#else
  std::vector<float> wide(rows * in);
  parallel_for(rows, rows_worth_a_thread(in), [&](int64_t begin, int64_t end) {
    copy_row(wide.data() + begin * in, (const bf16*)x + begin * in, (end - begin) * in);
  });
  linear<FloatOperand>(wide.data(), blocks, (const bf16*)bias, (bf16*)y, rows, in, out);
#endif
}

// The weights of one block's outputs, as columns of weight [in, out].
template <class T>
static void put_columns_of(const uint8_t* blocks, T* weight, int64_t in, int64_t out) {
  for (int64_t k = 0; k < in; k += INPUTS, blocks += BLOCK_BYTES) {
    if constexpr (std::is_same_v<T, float>) {
      put_block<FloatOperand>(blocks, weight + k * out, out);
    } else {
      float block[INPUTS * OUTPUTS];
      put_block<FloatOperand>(blocks, block, OUTPUTS);
      for (int i = 0; i < INPUTS; ++i) {
        for (int j = 0; j < OUTPUTS; j += W) {
          store(weight + (k + i) * out + j, load(block + i * OUTPUTS + j));
        }
      }
    }
  }
}

template <class T>
static void weight_of(const uint8_t* blocks, T* weight, int64_t in, int64_t out) {
  parallel_for(out / OUTPUTS, rows_worth_a_thread(OUTPUTS * in), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      put_columns_of(blocks + panel * (in / INPUTS) * BLOCK_BYTES, weight + panel * OUTPUTS, in,
                     out);
    }
  });
}

static void int4_weight(bool is_bf16, const uint8_t* blocks, void* weight, int64_t in,
                        int64_t out) {
  is_bf16 ? weight_of(blocks, (bf16*)weight, in, out) : weight_of(blocks, (float*)weight, in, out);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
