// What csrc/cuda uses of CUDA, on the CPU: for tests on machines without a GPU.
//
// In a build with GEN_FAST_HOST_CUDA, cuda/launch.cuh includes this file, and csrc/cuda/*.cu compile
// unchanged as C++20. A thread of a block is a thread of the host under a sanitizer, and elsewhere a
// context of one thread, which switches faster; blocks run one after another, so a static
// variable is shared memory. What csrc/cuda does not use yet is missing, and fails to compile.
//
// What CUDA leaves undefined aborts with a message where it would go unseen: threads of a warp or a
// block that wait at different places, a warp that is not whole. Under ThreadSanitizer only
// __syncthreads() orders accesses to memory: a shuffle does not, as in CUDA.
//
// What is not as on a GPU:
// - Speed. The order of blocks, too: a race between two blocks is not seen.
// - rsqrtf is rounded once; a GPU's errs by up to 2 units in the last place. Products and sums are
//   not contracted.
// - __launch_bounds__, streams, and limits on registers and shared memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <latch>
#include <memory>
#include <semaphore>
#include <thread>
#include <utility>
#include <vector>

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define HOST_CUDA_CONTEXTS
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

#ifdef __SANITIZE_THREAD__
extern "C" {
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
}
#endif

namespace host_cuda {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "host_cuda: %s\n", what);
  std::abort();
}

// What a thread waits for: the others of its warp or block.
enum class Meeting { shuffle, barrier, end };

// Returns when `turns` is no longer `turn`.
inline void wait_for_turn(std::atomic<int>& turns, int turn);

class Barrier {
 public:
  explicit Barrier(int threads) : threads(threads) {}

  // Waits for all threads. The last one calls `alone` before the others go on.
  template <class F>
  void wait(Meeting meeting, const F& alone) {
    const int turn = turns.load();
    const uint64_t one = uint64_t{1} << (16 * (int)meeting);  // 16 bits count each meeting's threads
    const uint64_t all = waiting.fetch_add(one) + one;
    if ((int)((all & 0xffff) + (all >> 16 & 0xffff) + (all >> 32)) < threads) {
      wait_for_turn(turns, turn);
      return;
    }
    if (all != one * threads) fail("threads wait at different places, or some have returned");
    alone();
    waiting.store(0);
    turns.store(turn + 1);
    turns.notify_all();
  }

 private:
  const int threads;
  std::atomic<uint64_t> waiting{0};
  std::atomic<int> turns{0};
};

struct Warp {
  Barrier barrier{32};
  std::atomic<uint32_t> values[2][32];  // two shuffles in turns, so that one barrier each is enough
};

struct Block {
  explicit Block(int threads) : barrier(threads), warps(threads / 32) {}
  Barrier barrier;
  std::vector<Warp> warps;
};

inline thread_local Block* block;
inline thread_local int thread, shuffles;

// Inside it, ThreadSanitizer does not take atomic operations as an order of other accesses.
struct Unordered {
#ifdef __SANITIZE_THREAD__
  Unordered() { AnnotateIgnoreSyncBegin(__FILE__, __LINE__); }
  ~Unordered() { AnnotateIgnoreSyncEnd(__FILE__, __LINE__); }
#else
  Unordered() {}
#endif
};

inline void wait_for_warp(Meeting meeting) {
  block->warps[thread / 32].barrier.wait(meeting, [] {});
}

// The warp meets first: else one of its threads at a shuffle and another here would wait for ever.
template <class F>
inline void wait_for_block(Meeting meeting, const F& alone) {
  {
    const Unordered unordered;
    wait_for_warp(meeting);
  }
  block->barrier.wait(meeting, alone);
}

// Shared memory, which test_host_cuda.py finds in the symbol table: it holds NaN when a block begins.
struct Range {
  void* begin;
  size_t bytes;
};
inline std::vector<Range> shared_memory;

extern "C" __attribute__((used)) inline void host_cuda_shared_memory(void* begin, size_t bytes) {
  shared_memory.push_back({begin, bytes});
}

inline void forget_shared_memory() {
  for (const Range& range : shared_memory) std::memset(range.begin, 0xff, range.bytes);
}

#ifdef HOST_CUDA_CONTEXTS

// The contexts of a block's threads take turns: each runs until it waits or ends.
class Threads {
 public:
  // Calls f(0), …, f(count - 1), each in a context of its own.
  void run(int count, const std::function<void(int)>& f) {
    while ((int)contexts.size() < count) contexts.emplace_back(std::make_unique<Context>());
    task = &f;
    for (int number = 0; number < count; ++number) {
      Context& context = *contexts[number];
      getcontext(&context.state);
      context.state.uc_stack.ss_sp = context.stack.get();
      context.state.uc_stack.ss_size = stack_bytes;
      context.state.uc_link = &caller;  // where it goes on when it ends
      context.ended = false;
      makecontext(&context.state, (void (*)())begin, 1, number);
    }
    for (int running = count; running;) {
      running = 0;
      for (current = 0; current < count; ++current) {
        Context& context = *contexts[current];
        if (context.ended) continue;
        swapcontext(&caller, &context.state);
        running += !context.ended;
      }
    }
  }

  // Lets the others run. What is a thread's own is kept on its stack meanwhile.
  void yield() {
    const dim3 own_thread = threadIdx, own_block = blockIdx;
    const int number = thread, shuffled = shuffles;
    swapcontext(&contexts[current]->state, &caller);
    threadIdx = own_thread;
    blockIdx = own_block;
    thread = number;
    shuffles = shuffled;
  }

 private:
  static constexpr size_t stack_bytes = 1 << 18;

  struct Context {
    ucontext_t state;
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    bool ended = false;
  };

  static void begin(int number);

  ucontext_t caller;
  std::vector<std::unique_ptr<Context>> contexts;
  const std::function<void(int)>* task = nullptr;
  int current = 0;
};
inline Threads all_threads;

inline void Threads::begin(int number) {
  (*all_threads.task)(number);
  all_threads.contexts[number]->ended = true;
}

inline void wait_for_turn(std::atomic<int>& turns, int turn) {
  while (turns.load() == turn) all_threads.yield();
}

#else

// Threads that stay for the next kernel: to make one takes longer than most blocks, far longer under
// ThreadSanitizer.
class Threads {
 public:
  // Calls f(0), …, f(count - 1), each on a thread of its own.
  void run(int count, const std::function<void(int)>& f) {
    while ((int)workers.size() < count) workers.emplace_back(std::make_unique<Worker>());
    std::latch done(count);
    for (int number = 0; number < count; ++number) {
      workers[number]->start([&, number] {
        f(number);
        done.count_down();
      });
    }
    done.wait();
  }

 private:
  class Worker {
   public:
    ~Worker() {
      start({});
      thread.join();
    }

    void start(std::function<void()> next) {
      task = std::move(next);
      ready.release();
    }

   private:
    void loop() {
      for (;;) {
        ready.acquire();
        const std::function<void()> now = std::move(task);  // the next may come while it ends
        if (!now) return;
        now();
      }
    }

    std::function<void()> task;  // none: return
    std::binary_semaphore ready{0};
    std::thread thread{&Worker::loop, this};
  };

  std::vector<std::unique_ptr<Worker>> workers;
};
inline Threads all_threads;

inline void wait_for_turn(std::atomic<int>& turns, int turn) { turns.wait(turn); }

#endif

inline cudaError_t last_error = cudaSuccess;

template <class... Parameters>
void run(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, Parameters... arguments) {
  const uint64_t count = (uint64_t)threads.x * threads.y * threads.z;
  const bool valid = blocks.x && blocks.x <= 0x7fffffff && blocks.y && blocks.y <= 0xffff &&
                     blocks.z && blocks.z <= 0xffff && count && count <= 1024 && threads.z <= 64;
  if (!valid) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (count % 32) fail("a block must have whole warps");
  Block shared((int)count);
  const auto run_thread = [&](int number) {
    block = &shared;
    shuffles = 0;
    thread = number;
    blockDim = threads;
    gridDim = blocks;
    threadIdx = dim3(number % threads.x, number / threads.x % threads.y,
                     number / threads.x / threads.y);
    for (blockIdx.z = 0; blockIdx.z < blocks.z; ++blockIdx.z) {
      for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) {
          kernel(arguments...);
          wait_for_block(Meeting::end, forget_shared_memory);
        }
      }
    }
  };
  forget_shared_memory();
  all_threads.run((int)count, run_thread);
}

// A float of few bits, which saturates where it has no infinity.
template <class Bits, int exponent_bits, int mantissa_bits, bool has_infinity>
struct Small {
  static constexpr int bias = (1 << (exponent_bits - 1)) - 1;
  static constexpr int nan = (1 << (exponent_bits + mantissa_bits)) - 1;
  static constexpr int infinity = ((1 << exponent_bits) - 1) << mantissa_bits;

  static Bits rounded(float x) {
    if (std::isnan(x)) return nan;
    const int sign = std::signbit(x) ? nan + 1 : 0;
    const int largest = has_infinity ? infinity : nan - 1;
    if (std::isinf(x)) return sign | largest;
    const int exponent = x == 0 ? 1 - bias : std::max(std::ilogb(x), 1 - bias);
    const double units = std::nearbyint(std::ldexp(std::fabs((double)x), mantissa_bits - exponent));
    // A carry out of the mantissa goes into the exponent; a denormal has none of it.
    const int64_t bits = ((int64_t)(exponent + bias - 1) << mantissa_bits) + (int64_t)units;
    return sign | (int)std::min<int64_t>(bits, largest);
  }

  static float value(Bits bits) {
    const int magnitude = bits & nan;
    const int exponent = magnitude >> mantissa_bits, mantissa = magnitude & ((1 << mantissa_bits) - 1);
    float x = std::ldexp((float)(mantissa + (exponent ? 1 << mantissa_bits : 0)),
                         std::max(exponent, 1) - bias - mantissa_bits);
    if (magnitude == nan || (has_infinity && magnitude > infinity)) x = NAN;
    if (has_infinity && magnitude == infinity) x = INFINITY;
    return bits > nan ? -x : x;
  }
};
typedef Small<uint16_t, 8, 7, true> Bf16;
typedef Small<uint16_t, 5, 10, true> F16;
typedef Small<uint8_t, 4, 3, false> E4m3;

}  // namespace host_cuda

inline cudaError_t cudaGetLastError() {
  return std::exchange(host_cuda::last_error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

inline void __syncthreads() {
  host_cuda::wait_for_block(host_cuda::Meeting::barrier, [] {});
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) == 4);
  using namespace host_cuda;
  if (mask != 0xffffffffu) fail("a shuffle of a part of a warp");
  const Unordered unordered;
  auto& values = block->warps[thread / 32].values[shuffles++ % 2];
  values[thread % 32] = std::bit_cast<uint32_t>(value);
  wait_for_warp(Meeting::shuffle);
  return std::bit_cast<T>(values[(thread % 32) ^ lanes].load());
}

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct __nv_fp8_e4m3 {
  uint8_t bits;
  __nv_fp8_e4m3() = default;
  explicit __nv_fp8_e4m3(float x) : bits(host_cuda::E4m3::rounded(x)) {}
};

inline float __bfloat162float(__nv_bfloat16 x) { return host_cuda::Bf16::value(x.bits); }
inline float __half2float(__half x) { return host_cuda::F16::value(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {host_cuda::Bf16::rounded(x)}; }
inline __half __float2half_rn(float x) { return {host_cuda::F16::rounded(x)}; }

// To the nearest, at most the largest; 0 for NaN.
inline int __float2int_rn(float x) {
  if (std::isnan(x)) return 0;
  return (int)std::clamp(std::nearbyint((double)x), -0x1p31, 0x1p31 - 1);
}

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float rsqrtf(float x) { return (float)(1.0 / std::sqrt((double)x)); }
inline int max(int a, int b) { return a > b ? a : b; }
