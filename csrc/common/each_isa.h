// Compiles one source file once for each instruction set, in a namespace of its own.
//
// A source defines GEN_FAST_SOURCE and includes this file; this file includes the source again for
// each instruction set, with GEN_FAST_ISA naming the namespace. GEN_FAST_DISPATCH(f) then calls the
// best version that the processor runs. Baseline is whatever the compiler targets by default, so
// the extension also works on processors other than x86-64.
//
// With GEN_FAST_EMULATED, which only tests define, the AVX-512 and AMX versions are compiled for AVX2,
// and tests/native/emulated_avx512.h has their intrinsics: a processor without these can run them.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/parallel.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define GEN_FAST_ISA baseline
#define GEN_FAST_VECTOR_BYTES 16
#include GEN_FAST_SOURCE
#undef GEN_FAST_ISA
#undef GEN_FAST_VECTOR_BYTES

#if defined(__x86_64__)

#define GEN_FAST_ISA avx2
#define GEN_FAST_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include GEN_FAST_SOURCE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef GEN_FAST_ISA
#undef GEN_FAST_VECTOR_BYTES

#if defined(GEN_FAST_EMULATED)
// For AVX2 as its callers are: how a vector is returned depends on that.
#include <cstdio>
#include <cstdlib>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "emulated_avx512.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// AVX-512 with the dot product of bytes alone, for a source that asks for it: Cascade Lake, Ice Lake.
#if defined(GEN_FAST_WITH_VNNI)
#define GEN_FAST_ISA vnni
#define GEN_FAST_VECTOR_BYTES 64
#define GEN_FAST_BYTE_DOT 1
#if defined(GEN_FAST_EMULATED)
#define GEN_FAST_VNNI "avx2,fma"
#else
#define GEN_FAST_VNNI "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(GEN_FAST_VNNI))), apply_to = function)
#elif defined(GEN_FAST_EMULATED)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
#include GEN_FAST_SOURCE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef GEN_FAST_BYTE_DOT
#undef GEN_FAST_ISA
#undef GEN_FAST_VECTOR_BYTES
#define GEN_FAST_IF_VNNI(function) gen_fast::isa_level() == 2 ? gen_fast::vnni::function:
#else
#define GEN_FAST_IF_VNNI(function)
#endif

// AVX-512 with the dot products of bfloat16 and of bytes: Zen 4, Sapphire Rapids and newer.
#define GEN_FAST_ISA avx512
#define GEN_FAST_VECTOR_BYTES 64
#define GEN_FAST_BF16_DOT 1
#define GEN_FAST_BYTE_DOT 1
#if defined(GEN_FAST_EMULATED)
#define GEN_FAST_AVX512 "avx2,fma"
#else
#define GEN_FAST_AVX512 "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni"
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(GEN_FAST_AVX512))), apply_to = function)
#elif defined(GEN_FAST_EMULATED)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")
#endif
#include GEN_FAST_SOURCE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef GEN_FAST_BF16_DOT
#undef GEN_FAST_BYTE_DOT
#undef GEN_FAST_ISA
#undef GEN_FAST_VECTOR_BYTES

// AVX-512 as above and AMX's tiles of bfloat16, for a source that asks for them: Sapphire Rapids.
#if defined(GEN_FAST_WITH_AMX) && defined(GEN_FAST_AMX)
#define GEN_FAST_ISA amx
#define GEN_FAST_VECTOR_BYTES 64
#define GEN_FAST_BF16_DOT 1
#define GEN_FAST_BYTE_DOT 1
#define GEN_FAST_TILES 1
#if defined(GEN_FAST_EMULATED)
#define GEN_FAST_TILES_TARGET GEN_FAST_AVX512
#else
#define GEN_FAST_TILES_TARGET GEN_FAST_AVX512 ",amx-tile,amx-bf16"
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(GEN_FAST_TILES_TARGET))), apply_to = function)
#elif defined(GEN_FAST_EMULATED)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")
#pragma GCC target("amx-tile,amx-bf16")
#endif
#include GEN_FAST_SOURCE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef GEN_FAST_TILES
#undef GEN_FAST_BF16_DOT
#undef GEN_FAST_BYTE_DOT
#undef GEN_FAST_ISA
#undef GEN_FAST_VECTOR_BYTES
#define GEN_FAST_IF_AMX(function) gen_fast::isa_level() == 4 ? gen_fast::amx::function:
#else
#define GEN_FAST_IF_AMX(function)
#endif

#define GEN_FAST_DISPATCH(function)                              \
  (GEN_FAST_IF_AMX(function)                                     \
   gen_fast::isa_level() >= 3   ? gen_fast::avx512::function     \
   : GEN_FAST_IF_VNNI(function)                                  \
   gen_fast::isa_level() >= 1   ? gen_fast::avx2::function       \
                                : gen_fast::baseline::function)
#else
#define GEN_FAST_DISPATCH(function) gen_fast::baseline::function
#endif
