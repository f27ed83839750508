// Rows of two embedding tables, copied by one warp each, in 16-byte pieces where rows allow it.
#include "cuda/ops.h"
#include "cuda/rows.cuh"

namespace gen_fast::cuda {

constexpr int WARPS = 8;

template <class Piece>
__global__ void __launch_bounds__(32 * WARPS)
    append_row(const Piece* table, const Piece* special, const int64_t* ids, Piece* out,
               int64_t rows, int64_t vocabulary, int64_t n_special, int64_t pieces) {
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.y;
  if (row >= rows) return;
  const int64_t id = ids[row];
  const Piece* from = id < vocabulary ? table + id * pieces : special + (id - vocabulary) * pieces;
  const bool known = id >= 0 && id < vocabulary + n_special;
  for (int64_t i = threadIdx.x; i < pieces; i += 32) {
    out[row * pieces + i] = known ? from[i] : Piece{};
  }
}

template <class Piece>
static void launch(const void* table, const void* special, const int64_t* ids, void* out,
                   int64_t rows, int64_t vocabulary, int64_t n_special, int64_t row_bytes,
                   Stream stream) {
  const dim3 block(32, WARPS);
  const unsigned blocks = (unsigned)((rows + WARPS - 1) / WARPS);
  append_row<<<blocks, block, 0, (cudaStream_t)stream>>>(
      (const Piece*)table, (const Piece*)special, ids, (Piece*)out, rows, vocabulary, n_special,
      row_bytes / (int64_t)sizeof(Piece));
}

const char* append(const void* table, const void* special, const int64_t* ids, void* out,
                   int64_t rows, int64_t vocabulary, int64_t n_special, int64_t row_bytes,
                   Stream stream) {
  const auto run = row_bytes % 16 == 0 ? launch<uint4> : launch<uint16_t>;
  run(table, special, ids, out, rows, vocabulary, n_special, row_bytes, stream);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gen_fast::cuda
