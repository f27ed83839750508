// Compiles one source file once for each instruction set, in a namespace of its own.
//
// A source defines GEN_FAST_SOURCE and includes this file; this file includes the source again for
// each instruction set, with GEN_FAST_ISA naming the namespace. GEN_FAST_DISPATCH(f) then calls the
// best version that the processor runs. Baseline is whatever the compiler targets by default, so
// the extension also works on processors other than x86-64.
//
// With GEN_FAST_EMULATED, which only tests define, the AVX-512, VNNI and AMX versions are compiled for
// AVX2, and tests/native/emulated_avx512.h has their intrinsics: a processor without these can run
// them. The version that is for AVX2 is left out.
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

// GEN_FAST_BEGIN(features) … GEN_FAST_END: functions between are for processors with these.
#define GEN_FAST_PRAGMA_OF(...) _Pragma(#__VA_ARGS__)
#define GEN_FAST_PRAGMA(...) GEN_FAST_PRAGMA_OF(__VA_ARGS__)
#if defined(__clang__)
#define GEN_FAST_BEGIN(features) \
  GEN_FAST_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define GEN_FAST_END GEN_FAST_PRAGMA(clang attribute pop)
#else
#define GEN_FAST_BEGIN(features)   \
  GEN_FAST_PRAGMA(GCC push_options) \
  GEN_FAST_PRAGMA(GCC target(features))
#define GEN_FAST_END GEN_FAST_PRAGMA(GCC pop_options)
#endif

#define GEN_FAST_FOR_AVX2 "avx2,fma"
#if defined(GEN_FAST_EMULATED)
#define GEN_FAST_FOR_AVX2_VNNI GEN_FAST_FOR_AVX2
#define GEN_FAST_FOR_AVX512_VNNI GEN_FAST_FOR_AVX2
#define GEN_FAST_FOR_AVX512 GEN_FAST_FOR_AVX2
#define GEN_FAST_FOR_AMX GEN_FAST_FOR_AVX2
// For AVX2 as its callers are: how a vector is returned depends on that.
#include <cstdio>
#include <cstdlib>
GEN_FAST_BEGIN(GEN_FAST_FOR_AVX2)
#include "emulated_avx512.h"
GEN_FAST_END
#else
#define GEN_FAST_FOR_AVX2_VNNI "avx2,fma,avxvnni"
#define GEN_FAST_FOR_AVX512_VNNI "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#define GEN_FAST_FOR_AVX512 "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"
#define GEN_FAST_FOR_AMX \
  "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16"
#endif

#if !defined(GEN_FAST_EMULATED)
#define GEN_FAST_ISA avx2
#define GEN_FAST_VECTOR_BYTES 32
GEN_FAST_BEGIN(GEN_FAST_FOR_AVX2)
#include GEN_FAST_SOURCE
GEN_FAST_END
#undef GEN_FAST_ISA
#undef GEN_FAST_VECTOR_BYTES
#define GEN_FAST_IF_AVX2(function) \
  gen_fast::isa() >= gen_fast::Isa::AVX2 ? gen_fast::avx2::function:
#else
#define GEN_FAST_IF_AVX2(function)
#endif

// The dot product of bytes without that of bfloat16, for a source that asks for it.
#if defined(GEN_FAST_WITH_VNNI) && defined(GEN_FAST_AVX2_VNNI)
#define GEN_FAST_ISA avx2_vnni
#define GEN_FAST_VECTOR_BYTES 32
#define GEN_FAST_BYTE_DOT 1
GEN_FAST_BEGIN(GEN_FAST_FOR_AVX2_VNNI)
#include GEN_FAST_SOURCE
GEN_FAST_END
#undef GEN_FAST_BYTE_DOT
#undef GEN_FAST_ISA
#undef GEN_FAST_VECTOR_BYTES
#define GEN_FAST_IF_AVX2_VNNI(function) \
  gen_fast::isa() == gen_fast::Isa::AVX2_VNNI ? gen_fast::avx2_vnni::function:
#else
#define GEN_FAST_IF_AVX2_VNNI(function)
#endif

#if defined(GEN_FAST_WITH_VNNI)
#define GEN_FAST_ISA avx512_vnni
#define GEN_FAST_VECTOR_BYTES 64
#define GEN_FAST_BYTE_DOT 1
GEN_FAST_BEGIN(GEN_FAST_FOR_AVX512_VNNI)
#include GEN_FAST_SOURCE
GEN_FAST_END
#undef GEN_FAST_BYTE_DOT
#undef GEN_FAST_ISA
#undef GEN_FAST_VECTOR_BYTES
#define GEN_FAST_IF_AVX512_VNNI(function) \
  gen_fast::isa() == gen_fast::Isa::AVX512_VNNI ? gen_fast::avx512_vnni::function:
#else
#define GEN_FAST_IF_AVX512_VNNI(function)
#endif

// With the dot products of bfloat16 and of bytes.
#define GEN_FAST_ISA avx512
#define GEN_FAST_VECTOR_BYTES 64
#define GEN_FAST_BF16_DOT 1
#define GEN_FAST_BYTE_DOT 1
GEN_FAST_BEGIN(GEN_FAST_FOR_AVX512)
#include GEN_FAST_SOURCE
GEN_FAST_END
#undef GEN_FAST_BF16_DOT
#undef GEN_FAST_BYTE_DOT
#undef GEN_FAST_ISA
#undef GEN_FAST_VECTOR_BYTES

// And with AMX's tiles of bfloat16, for a source that asks for them.
#if defined(GEN_FAST_WITH_AMX) && defined(GEN_FAST_AMX)
#define GEN_FAST_ISA amx
#define GEN_FAST_VECTOR_BYTES 64
#define GEN_FAST_BF16_DOT 1
#define GEN_FAST_BYTE_DOT 1
#define GEN_FAST_TILES 1
GEN_FAST_BEGIN(GEN_FAST_FOR_AMX)
#include GEN_FAST_SOURCE
GEN_FAST_END
#undef GEN_FAST_TILES
#undef GEN_FAST_BF16_DOT
#undef GEN_FAST_BYTE_DOT
#undef GEN_FAST_ISA
#undef GEN_FAST_VECTOR_BYTES
#define GEN_FAST_IF_AMX(function) \
  gen_fast::isa() == gen_fast::Isa::AMX ? gen_fast::amx::function:
#else
#define GEN_FAST_IF_AMX(function)
#endif

#define GEN_FAST_DISPATCH(function)                                      \
  (GEN_FAST_IF_AMX(function)                                             \
   gen_fast::isa() >= gen_fast::Isa::AVX512 ? gen_fast::avx512::function \
   : GEN_FAST_IF_AVX512_VNNI(function)                                   \
     GEN_FAST_IF_AVX2_VNNI(function)                                     \
     GEN_FAST_IF_AVX2(function)                                          \
   gen_fast::baseline::function)
#else
#define GEN_FAST_DISPATCH(function) gen_fast::baseline::function
#endif
