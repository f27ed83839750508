// Threads and the processor's abilities.
//
// OpenMP, because torch uses it: both link libgomp.so.1, so the process has one pool of threads
// and torch.set_num_threads counts for us too. A second pool would fight with torch's, whose idle
// workers spin for milliseconds.
#pragma once

#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace gen_fast {

// Whether the compiler knows AMX and AVX-VNNI: GCC 11, Clang 12 and newer.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define GEN_FAST_AMX 1
#define GEN_FAST_AVX2_VNNI 1
#endif

// What ops are compiled for, best last; native.py has their names. The dot product of bytes (VNNI)
// comes for vectors of AVX2 (Alder Lake and newer) or of AVX-512 (Cascade Lake), that of bfloat16
// only with both (Zen 4, Sapphire Rapids).
enum class Isa : int { BASELINE, AVX2, AVX2_VNNI, AVX512_VNNI, AVX512, AMX };

// The best that the processor has and the system lets us use, up to what tests and benchmarks ask.
Isa isa();

// Starting a thread costs about as much as this many elements.
constexpr int64_t WORTH_A_THREAD = 16384;

inline int64_t rows_worth_a_thread(int64_t elements_of_a_row) {
  return WORTH_A_THREAD / (elements_of_a_row + 1);
}

// Runs body(begin, end) over parts of [0, n), in parallel if each thread gets at least `grain`.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
#pragma omp parallel if (n > grain)
  {
    int64_t threads = 1, id = 0;
#if defined(_OPENMP)
    threads = omp_get_num_threads();
    id = omp_get_thread_num();
#endif
    const int64_t part = (n + threads - 1) / threads;
    const int64_t begin = id * part, end = begin + part < n ? begin + part : n;
    if (begin < end) body(begin, end);
  }
}

// Runs body(i) for each i in [0, n); threads, if all tasks together touch enough elements, take the
// next one when they are free.
template <class Body>
void parallel_tasks(int64_t n, int64_t elements, const Body& body) {
#pragma omp parallel for schedule(dynamic, 1) if (n > 1 && elements > WORTH_A_THREAD)
  for (int64_t i = 0; i < n; ++i) body(i);
}

}  // namespace gen_fast
