// The CUDA runtime, and the launch of a kernel. In a build with GEN_FAST_HOST_CUDA, which is for tests,
// tests/native/host_cuda.h stands in for both: kernels then run on the CPU.
#pragma once

#ifdef GEN_FAST_HOST_CUDA
#include "host_cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#endif

#include <type_traits>

#include "cuda/ops.h"

namespace gen_fast::cuda {

// Starts `kernel` with `blocks` blocks of `threads` threads. Returns nullptr, or what went wrong.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, Stream stream,
                   std::type_identity_t<Parameters>... arguments) {
#ifdef GEN_FAST_HOST_CUDA
  host_cuda::run(kernel, blocks, threads, arguments...);
#else
  kernel<<<blocks, threads, 0, (cudaStream_t)stream>>>(arguments...);
#endif
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gen_fast::cuda
