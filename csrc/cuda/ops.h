// The CUDA ops. Device pointers and a stream in; nothing is allocated and nothing waits. Each
// returns nullptr, or what went wrong. Rows must be contiguous and 16-byte aligned.
#pragma once

#include <cstdint>

namespace gen_fast::cuda {

enum class Dtype { f32, bf16, f16 };

// What the normed rows are stored as: the dtype of x, or quantised with a scale a row.
enum class Store { plain, int8, fp8 };

typedef uintptr_t Stream;

// total = x + residual, out = rms_norm(total) * weight; total may be residual. scales [rows] only
// if quantised.
const char* add_rms_norm(Dtype dtype, Store store, const void* x, const void* residual,
                         const void* weight, void* total, void* out, float* scales, int64_t rows,
                         int64_t size, float eps, Stream stream);

// out [rows, row_bytes]: row ids[r] of table, or row ids[r] - vocabulary of special; zeros for an
// id of neither. row_bytes is a multiple of 2.
const char* append(const void* table, const void* special, const int64_t* ids, void* out,
                   int64_t rows, int64_t vocabulary, int64_t n_special, int64_t row_bytes,
                   Stream stream);

// out [texts, size] float32: weighted mean of the normed rows of each text.
const char* pool(Dtype dtype, const void* hidden, const int32_t* cu_seqlens,
                 const void* norm_weight, const float* row_weights, float* out, int64_t texts,
                 int64_t size, float eps, Stream stream);

}  // namespace gen_fast::cuda
