// The C++ ops. Raw pointers in; strides in elements. Each thread keeps what attention works in.
#pragma once

#include <cstdint>

namespace gen_fast {

enum class Dtype { f32, bf16 };

// total = x + residual, out = rms_norm(total) * weight; total may be residual. [rows, size].
void add_rms_norm(Dtype dtype, const void* x, const void* residual, const void* weight,
                  void* total, void* out, int64_t rows, int64_t size, float eps);

// The same with the normed rows quantised before they reach memory: see quantize_rows.
void add_rms_norm_quantized(Dtype dtype, const void* x, const void* residual, const void* weight,
                            void* total, int8_t* out, float* scales, int64_t rows, int64_t size,
                            float eps, bool rotated);

// Gradient [rows, size] of x (and of the residual) from those of both results.
void add_rms_norm_backward(Dtype dtype, const void* grad_normed, const void* grad_total,
                           const void* total, const void* weight, void* out, int64_t rows,
                           int64_t size, float eps);

// out [rows, size] = silu(gate) * up, gate_up [rows, 2 * size].
void swiglu(Dtype dtype, const void* gate_up, void* out, int64_t rows, int64_t size);

// The same with the rows quantised before they reach memory: see quantize_rows.
void swiglu_quantized(Dtype dtype, const void* gate_up, int8_t* out, float* scales, int64_t rows,
                      int64_t size, bool rotated);

// out [rows, 2 * size], the gradient of gate_up, from grad [rows, size].
void swiglu_backward(Dtype dtype, const void* grad, const void* gate_up, void* out, int64_t rows,
                     int64_t size);

// Each row [size] of x as round(x / scale), scale = max |x| / 127; scales [rows]. rotated: of the
// row times a Hadamard matrix, see kernels/qlinear/reference.py.
void quantize_rows(Dtype dtype, const void* x, int8_t* out, float* scales, int64_t rows,
                   int64_t size, bool rotated);

struct GroupArguments {
  int bits;                             // of a weight
  const void* x;                        // [rows, in]
  const uint8_t* blocks;                // [out / 16, in / 32, n]: see kernels/qlinear/groups.py
  const void* bias;                     // [out]; null for none
  void* y;                              // [rows, out]
  int64_t rows, in, out;
};

// y = x times the weight's transpose, plus bias. dtype: of x, bias and y.
void group_linear(Dtype dtype, const GroupArguments& arguments);

// weight [in, out]: the transpose of what blocks hold.
void group_weight(Dtype dtype, int bits, const uint8_t* blocks, void* weight, int64_t in,
                  int64_t out);

struct Int8Arguments {
  const int8_t* q;                      // [rows, in]
  const float* scales;                  // [rows]
  const int8_t* blocks;                 // [out / 16, in / 4, 64]: see kernels/qlinear/int8.py
  const float* weight_scales;           // [out]
  const void* bias;                     // [out]; null for none
  void* y;                              // [rows, out]
  int64_t rows, in, out;
};

// y = q times the weight's transpose, times both scales, plus bias. dtype: of bias and y.
void int8_linear(Dtype dtype, const Int8Arguments& arguments);

// weight [out, in]: what blocks and scales [out] hold, its rows rotated back as rotate_rows does.
void int8_weight(Dtype dtype, const int8_t* blocks, const float* scales, void* weight, int64_t in,
                 int64_t out);

struct RopeArguments {
  const void *grad, *x;                       // [rows, heads, size]; grad backward only
  void* out;                                  // may be x
  const float *cos, *sin;                     // [rows, size / 2]
  const void* norm;                           // [heads, size]; null for no norm
  int64_t grad_stride, x_stride, out_stride;  // of a row
  int64_t rows, heads, size;
  float eps;
};

// Optional RMSNorm of each head, then rotation.
void rope(Dtype dtype, const RopeArguments& arguments);

// The gradient of x; x itself is read only if there is a norm.
void rope_backward(Dtype dtype, const RopeArguments& arguments);

// out [rows, row_bytes]: row ids[r] of table, or row ids[r] - vocabulary of special. Returns the
// first row whose id is in neither, having written nothing; -1 if there is none.
int64_t append(const void* table, const void* special, const int64_t* ids, void* out,
               int64_t rows, int64_t vocabulary, int64_t n_special, int64_t row_bytes);

// out [n_special, size]: sums of the rows of grad [rows, size] by special token.
void append_backward(Dtype dtype, const void* grad, const int64_t* ids, float* out, int64_t rows,
                     int64_t vocabulary, int64_t n_special, int64_t size);

// out [texts, size]: weighted mean of the normed rows cu_seqlens[t] … cu_seqlens[t + 1] - 1 of hidden;
// the plain mean if row_weights is null.
void pool(Dtype dtype, const void* hidden, const int32_t* cu_seqlens, const void* norm_weight,
          const float* row_weights, float* out, int64_t texts, int64_t size, float eps);

// losses [rows]: cross-entropy; logits [rows, vocabulary] become softmax - one-hot. Returns the
// first row whose target is no column, having written nothing; -1 if there is none.
int64_t cross_entropy(Dtype dtype, void* logits, const int64_t* targets, float* losses,
                      int64_t rows, int64_t vocabulary);

struct DropoutArguments {
  const void* x;             // [rows, size]
  const int32_t* text_keys;  // [rows]
  const int64_t* positions;  // [rows]
  void* out;                 // [rows, size]
  int64_t stride;            // of a row of x
  int64_t rows, size;
  uint32_t first_kept;       // of the words that are drawn
  float scale;               // of what is kept
  uint64_t seed;
  uint32_t c2;               // of the counters: which dropout this is
};

// out = x * scale where an element is kept, else 0; see kernels/dropout/README.md.
void dropout(Dtype dtype, const DropoutArguments& arguments);

enum class Mask { causal, bidirectional, gem };

// kernels/attention/options.py: what calls with other q, k and v may share.
struct AttentionOptions {
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [texts + 1]
  const void *prefix_k, *prefix_v;             // [prefix, kv_heads, size]; null if there is none
  const int32_t* blocks;                       // [texts, 2] for the GEM mask
  const int32_t* text_keys;                    // [texts] for dropout; null for none
  int64_t texts;
  int64_t prefix;
  int64_t prefix_k_stride, prefix_v_stride;    // of a row (token)
  int64_t window;                              // 0 for full attention
  Mask mask;
  uint64_t seed;
  int64_t layer;
  uint32_t first_kept;                         // of the words that are drawn
  float kept_scale;                            // of the weights that are kept; 1 without dropout
};

struct AttentionArguments : AttentionOptions {
  const void *q, *k, *v;                 // [rows of q, heads, size]; [rows, kv_heads, size]
  void* out;                             // [rows of q, heads, size], contiguous
  float* lse;                            // [rows of q, heads]: log-sum-exp of the scores; or null
  int64_t q_stride, k_stride, v_stride;  // of a row (token)
  int64_t rows;                          // of q; those beyond the last text's are padding
  int64_t heads, kv_heads, size;
};

// Packed attention; see kernels/attention/README.md. Padding rows get zeros.
void attention(Dtype dtype, const AttentionArguments& arguments);

// The gradients of out, read, and of q, k and v, written; rows as dense as those of out.
struct AttentionGradients {
  const void* dout;
  void *dq, *dk, *dv;
};

// dq, dk and dv get the rows that belong to a text with queries; others are untouched.
void attention_backward(Dtype dtype, const AttentionArguments& arguments,
                        const AttentionGradients& gradients);

}  // namespace gen_fast
