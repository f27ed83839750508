// Rows of two embedding tables, copied by one warp each, in 16-byte pieces where rows allow it.
#include "cuda/launch.cuh"

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
static const char* append_pieces(const void* table, const void* special, const int64_t* ids,
                                 void* out, int64_t rows, int64_t vocabulary, int64_t n_special,
                                 int64_t row_bytes, Stream stream) {
  const unsigned blocks = (unsigned)((rows + WARPS - 1) / WARPS);
  return launch(append_row<Piece>, blocks, dim3(32, WARPS), stream, (const Piece*)table,
                (const Piece*)special, ids, (Piece*)out, rows, vocabulary, n_special,
                row_bytes / (int64_t)sizeof(Piece));
}

const char* append(const void* table, const void* special, const int64_t* ids, void* out,
                   int64_t rows, int64_t vocabulary, int64_t n_special, int64_t row_bytes,
                   Stream stream) {
  const auto f = row_bytes % 16 == 0 ? append_pieces<uint4> : append_pieces<uint16_t>;
  return f(table, special, ids, out, rows, vocabulary, n_special, row_bytes, stream);
}

}  // namespace gen_fast::cuda
