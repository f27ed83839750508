// Runs the kernels of csrc/cuda on the CPU for a sanitizer: every op, dtype and stored format, at
// sizes that reach every instance of a kernel. With an argument, a kernel with that fault instead.
#include <cstring>
#include <memory>

#include "cuda/launch.cuh"

using namespace gen_fast::cuda;

namespace {

// Memory of exactly so many bytes: a sanitizer sees the first byte beyond them.
struct Buffer {
  explicit Buffer(int64_t size, int fill = 0) : bytes(new char[size]) {
    std::memset(bytes.get(), fill, size);
  }
  template <class T>
  operator T*() const {
    return (T*)bytes.get();
  }
  std::unique_ptr<char[]> bytes;
};

void check(const char* error) {
  if (error) host_cuda::fail(error);
}

// Of rows that take 1, 2 and 4 accesses a thread, and more: of one element, and of 16 bytes.
template <class F>
void each_size(int element, const F& f) {
  for (const int count : {1, 77, 257, 601, 2049}) {
    f(count);
    f(count * 16 / element);
  }
}

void run_norm() {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    const int element = dtype == Dtype::f32 ? 4 : 2;
    each_size(element, [&](int size) {
      for (const Store store : {Store::plain, Store::int8, Store::fp8}) {
        const int rows = size < 2000 ? 2 : 1;
        const Buffer x(rows * size * element, 1), weight(size * element, 1);
        const Buffer residual(rows * size * element), apart(rows * size * element);
        const Buffer out(rows * size * (store == Store::plain ? element : 1)), scales(4 * rows);
        const Buffer& total = store == Store::plain ? residual : apart;  // in place, as it may be
        check(add_rms_norm(dtype, store, x, residual, weight, total, out, scales, rows, size, 1e-5,
                           0));
      }
    });
  }
}

void run_pool() {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    const int element = dtype == Dtype::f32 ? 4 : 2;
    each_size(element, [&](int size) {
      const int32_t starts[] = {0, 3, 3, 4};
      const Buffer cu_seqlens(sizeof starts);
      std::memcpy((void*)cu_seqlens, starts, sizeof starts);
      const Buffer hidden(4 * size * element, 1), norm_weight(size * element, 1);
      const Buffer row_weights(4 * sizeof(float), 1), out(3 * size * sizeof(float));
      const float* weights = size % 2 ? (float*)row_weights : nullptr;
      check(pool(dtype, hidden, cu_seqlens, norm_weight, weights, out, 3, size, 1e-5, 0));
    });
  }
}

void run_append() {
  const int64_t ids[] = {6, 0, 7, 9, 8, -1, 10, 1, 3};
  for (const int row_bytes : {2, 10, 16, 128, 130, 1168}) {
    for (const int rows : {1, 8, 9}) {
      const Buffer table(7 * row_bytes), special(3 * row_bytes), out(rows * row_bytes);
      const Buffer wanted(rows * sizeof(int64_t));
      std::memcpy((void*)wanted, ids, rows * sizeof(int64_t));
      check(append(table, special, wanted, out, rows, 7, 3, row_bytes, 0));
      check(append(table, nullptr, wanted, out, rows, 7, 0, row_bytes, 0));
    }
  }
}

// The faults. Each thread gives its neighbour in another warp or in its own a number.

enum class Between { nothing, shuffle, barrier };

template <Between between, int distance>
__global__ void exchange(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = threadIdx.x;
  if constexpr (between == Between::shuffle) __shfl_xor_sync(0xffffffffu, 0, 1);
  if constexpr (between == Between::barrier) __syncthreads();
  out[threadIdx.x] = values[threadIdx.x ^ distance];
}

__global__ void write_beyond(char* out, int size) { out[threadIdx.x] = (int)threadIdx.x < size; }

template <int size>
__global__ void write_beyond_shared(char* out) {
  __shared__ char values[size];
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void read_misaligned(const char* in, uint4* out) {
  out[threadIdx.x] = ((const uint4*)(in + 4))[threadIdx.x];
}

__global__ void part_waits() {
  if (threadIdx.x != 5) __syncthreads();
}

__global__ void warp_waits() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void part_shuffles() {
  if (threadIdx.x % 2) __shfl_xor_sync(0xffffffffu, 0, 1);
}

bool run_fault(const char* name) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  const Buffer numbers(64 * sizeof(int)), bytes(63), vectors(65 * sizeof(uint4));
  if (is("none")) {
    check(launch(exchange<Between::barrier, 32>, 2, 64, 0, numbers));
  } else if (is("race")) {
    check(launch(exchange<Between::nothing, 32>, 2, 64, 0, numbers));
  } else if (is("race within a warp")) {
    check(launch(exchange<Between::shuffle, 1>, 2, 64, 0, numbers));
  } else if (is("overrun")) {
    check(launch(write_beyond, 1, 64, 0, bytes, 63));
  } else if (is("overrun of shared memory")) {
    check(launch(write_beyond_shared<60>, 1, 64, 0, numbers));
  } else if (is("misaligned")) {
    check(launch(read_misaligned, 1, 64, 0, vectors, Buffer(64 * sizeof(uint4))));
  } else if (is("divergent barrier")) {
    check(launch(part_waits, 1, 64, 0));
  } else if (is("barrier of one warp")) {
    check(launch(warp_waits, 1, 64, 0));
  } else if (is("divergent shuffle")) {
    check(launch(part_shuffles, 1, 64, 0));
  } else if (is("part of a warp")) {
    check(launch(exchange<Between::barrier, 32>, 1, 48, 0, numbers));
  } else if (is("no blocks")) {
    check(launch(exchange<Between::barrier, 32>, 0, 64, 0, numbers));
  } else {
    return false;
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) return run_fault(arguments[1]) ? 0 : 2;
  run_append();
  run_norm();
  run_pool();
}
