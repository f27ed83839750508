// The C++ ops. Raw pointers in, nothing allocated that outlives the call; strides in elements.
#pragma once

#include <cstdint>

namespace gen_fast {

enum class Dtype { f32, bf16 };

// total = x + residual, written over residual; out = rms_norm(total) * weight. Rows [rows, size].
void add_rms_norm(Dtype dtype, const void* x, void* residual, const void* weight, void* out,
                  int64_t rows, int64_t size, float eps);

// out [rows, size] = silu(gate) * up, gate_up [rows, 2 * size].
void swiglu(Dtype dtype, const void* gate_up, void* out, int64_t rows, int64_t size);

// In place on x [rows, heads, size] with row stride `stride`: optional RMSNorm of each head with
// norm [heads, size] (null for none), then rotation by cos, sin [rows, size / 2].
void rope(Dtype dtype, void* x, int64_t stride, const float* cos, const float* sin,
          const void* norm, int64_t rows, int64_t heads, int64_t size, float eps);

struct AttentionArguments {
  const void *q, *k, *v, *prefix_k, *prefix_v;
  void* out;                              // [rows of q, heads, size], contiguous
  const int32_t *q_offsets, *k_offsets;   // [texts + 1]
  int64_t texts, heads, kv_heads, size, prefix;
  int64_t q_stride, k_stride, v_stride, prefix_k_stride, prefix_v_stride;  // of a row (token)
  int64_t window;                         // 0 for full attention
};

// Causal packed attention; see kernels/attention/README.md.
void attention(Dtype dtype, const AttentionArguments& arguments);

}  // namespace gen_fast
