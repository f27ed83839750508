// Every intrinsic of emulated_avx512.h as a function of bytes, for test_emulation.py: emulated, and as
// this processor has it. This file includes itself for each.
#if !defined(PLACE)
#include <cpuid.h>
#include <immintrin.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

struct Arguments {
  std::vector<std::string> inputs;
  uint32_t mask;
};

struct Function {
  const char *name, *feature;
  void (*run)(const Arguments&, std::string& out);
};

template <class T>
static void put(std::string& out, const T& value) {
  out.assign((const char*)&value, sizeof value);
}

// In hardware first: the emulation takes away some of the compiler's names.
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own unmasked forms
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")
#pragma GCC target("avxvnni,amx-tile,amx-int8,amx-bf16")
#define PLACE hardware
#include "intrinsics.cpp"
#undef PLACE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "emulated_avx512.h"
#define PLACE gen_fast::tested
#include "intrinsics.cpp"
#undef PLACE
#pragma GCC pop_options

// Whether this processor has what the function needs, and the system lets us use it.
static bool has(const std::string& feature) {
  __builtin_cpu_init();
  if (feature == "avx512f") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (feature == "avx512bf16") return has("avx512f") && __builtin_cpu_supports("avx512bf16");
  if (feature == "avxvnni") {
    unsigned eax = 0, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 4);
  }
  if (feature == "avx512vnni") return has("avx512f") && __builtin_cpu_supports("avx512vnni");
  // Linux gives a process the tiles' state, number 18, when it asks for it.
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023;
  if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, 18) != 0) return false;
  return feature == "amx-int8" ? __builtin_cpu_supports("amx-int8")
                               : __builtin_cpu_supports("amx-bf16");
}

PYBIND11_MODULE(_intrinsics, m) {
  m.doc() = "Intrinsics, emulated and in hardware: for tests";
  m.def("names", [] {
    std::vector<std::string> names;
    for (const Function& one : gen_fast::tested::FUNCTIONS) names.push_back(one.name);
    return names;
  });
  m.def("in_hardware", [](const std::string& name) {
    for (const Function& one : hardware::FUNCTIONS) {
      if (one.name == name) return has(one.feature);
    }
    throw std::invalid_argument(name);
  });
  m.def("run", [](const std::string& name, bool in_hardware, uint32_t mask,
                  std::vector<std::string> inputs) {
    for (const Function& one : in_hardware ? hardware::FUNCTIONS : gen_fast::tested::FUNCTIONS) {
      if (one.name != name) continue;
      std::string out;
      one.run({std::move(inputs), mask}, out);
      return pybind11::bytes(out);
    }
    throw std::invalid_argument(name);
  });
}

#else

namespace PLACE {

// Here, not above: how a vector is returned depends on the instruction set.
template <class T>
static T at(const Arguments& in, int i) {
  if (in.inputs.at(i).size() != sizeof(T)) throw std::invalid_argument("an input's size");
  T value;
  std::memcpy(&value, in.inputs[i].data(), sizeof value);
  return value;
}

// out: an expression of the arguments `in` and of the mask.
#define FUNCTION(name, feature, expression)                                     \
  {                                                                             \
    name, feature, [](const Arguments& in, std::string& out) {                  \
      [[maybe_unused]] const __mmask16 mask = (__mmask16)in.mask;               \
      [[maybe_unused]] const __mmask8 mask8 = (__mmask8)in.mask;                \
      put(out, expression);                                                     \
    }                                                                           \
  }
#define I(i) at<__m512i>(in, i)
#define F(i) at<__m512>(in, i)

// What is stored at an odd address.
static __m512i stored(__m512i v) {
  alignas(64) char memory[65] = {};
  _mm512_storeu_si512(memory + 1, v);
  __m512i back;
  std::memcpy(&back, memory + 1, sizeof back);
  return back;
}

struct Matrix {
  char bytes[16 * 64];
};

// in: configuration, sum, left, right; what the sum's tile stores over bytes of 0xaa.
template <class Product>
static Matrix multiplied(const Arguments& in, const Product& product) {
  struct alignas(64) Configuration {
    char bytes[64];
  } configuration = at<Configuration>(in, 0);
  const Matrix sum = at<Matrix>(in, 1), left = at<Matrix>(in, 2), right = at<Matrix>(in, 3);
  Matrix out;
  std::memset(&out, 0xaa, sizeof out);
  _tile_loadconfig(&configuration);
  _tile_zero(0);
  _tile_loadd(0, sum.bytes, 64);
  _tile_stream_loadd(1, left.bytes, 64);
  _tile_loadd(2, right.bytes, 64);
  product();
  _tile_stored(0, out.bytes, 64);
  _tile_release();
  return out;
}

static const Function FUNCTIONS[] = {
    FUNCTION("loadu_si512", "avx512f", _mm512_loadu_si512(in.inputs.at(0).data())),
    FUNCTION("storeu_si512", "avx512f", stored(I(0))),
    FUNCTION("maskz_loadu_epi32", "avx512f",
             _mm512_maskz_loadu_epi32(mask, in.inputs.at(0).data())),
    FUNCTION("set1_epi32", "avx512f", _mm512_set1_epi32(at<int32_t>(in, 0))),
    FUNCTION("xor_si512", "avx512f", _mm512_xor_si512(I(0), I(1))),
    FUNCTION("maskz_unpacklo_epi32", "avx512f", _mm512_maskz_unpacklo_epi32(mask, I(0), I(1))),
    FUNCTION("maskz_unpackhi_epi32", "avx512f", _mm512_maskz_unpackhi_epi32(mask, I(0), I(1))),
    FUNCTION("maskz_unpacklo_epi64", "avx512f", _mm512_maskz_unpacklo_epi64(mask8, I(0), I(1))),
    FUNCTION("maskz_unpackhi_epi64", "avx512f", _mm512_maskz_unpackhi_epi64(mask8, I(0), I(1))),
    FUNCTION("maskz_shuffle_i32x4 88", "avx512f",
             _mm512_maskz_shuffle_i32x4(mask, I(0), I(1), 0x88)),
    FUNCTION("maskz_shuffle_i32x4 dd", "avx512f",
             _mm512_maskz_shuffle_i32x4(mask, I(0), I(1), 0xdd)),
    FUNCTION("maskz_shuffle_i32x4 1b", "avx512f",
             _mm512_maskz_shuffle_i32x4(mask, I(0), I(1), 0x1b)),
    FUNCTION("maskz_mul_epu32", "avx512f", _mm512_maskz_mul_epu32(mask8, I(0), I(1))),
    FUNCTION("dpbusd_epi32", "avx512vnni", _mm512_dpbusd_epi32(I(0), I(1), I(2))),
    FUNCTION("256 dpbusd_avx_epi32", "avxvnni",
             _mm256_dpbusd_avx_epi32(at<__m256i>(in, 0), at<__m256i>(in, 1), at<__m256i>(in, 2))),
    FUNCTION("maskz_cvtepu8_epi32", "avx512f",
             _mm512_maskz_cvtepu8_epi32(mask, at<__m128i>(in, 0))),
    FUNCTION("maskz_cvtepu16_epi32", "avx512f",
             _mm512_maskz_cvtepu16_epi32(mask, at<__m256i>(in, 0))),
    FUNCTION("maskz_cvtepi32_epi8", "avx512f", _mm512_maskz_cvtepi32_epi8(mask, I(0))),
    FUNCTION("cvtepi32_ps", "avx512f", _mm512_cvtepi32_ps(I(0))),
    FUNCTION("cvtneps_pbh", "avx512bf16", _mm512_cvtneps_pbh(F(0))),
    FUNCTION("cvtne2ps_pbh", "avx512bf16", _mm512_cvtne2ps_pbh(F(0), F(1))),
    FUNCTION("maskz_permutexvar_ps", "avx512f",
             _mm512_maskz_permutexvar_ps(mask, I(0), F(1))),
    FUNCTION("maskz_permutexvar_epi16", "avx512bw",
             _mm512_maskz_permutexvar_epi16((__mmask32)in.mask, I(0), I(1))),
    FUNCTION("dpbf16_ps", "avx512bf16",
             _mm512_dpbf16_ps(F(0), at<__m512bh>(in, 1), at<__m512bh>(in, 2))),
    FUNCTION("maskz_rcp14_ps", "avx512f", _mm512_maskz_rcp14_ps(mask, F(0))),
    FUNCTION("maskz_reduce_ps nearest", "avx512f", _mm512_maskz_reduce_ps(mask, F(0), 0x00)),
    FUNCTION("maskz_reduce_ps down", "avx512f", _mm512_maskz_reduce_ps(mask, F(0), 0x21)),
    FUNCTION("maskz_reduce_ps up", "avx512f", _mm512_maskz_reduce_ps(mask, F(0), 0x12)),
    FUNCTION("maskz_reduce_ps to zero", "avx512f", _mm512_maskz_reduce_ps(mask, F(0), 0x03)),
    FUNCTION("maskz_scalef_ps", "avx512f", _mm512_maskz_scalef_ps(mask, F(0), F(1))),
    FUNCTION("tile_dpbssd", "amx-int8", multiplied(in, [] { _tile_dpbssd(0, 1, 2); })),
    FUNCTION("tile_dpbf16ps", "amx-bf16", multiplied(in, [] { _tile_dpbf16ps(0, 1, 2); })),
};

#undef FUNCTION
#undef I
#undef F

}  // namespace PLACE
#endif
