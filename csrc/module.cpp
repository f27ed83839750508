// gen_fast._C: the C++ ops for Python. Python has checked its tensors.
#include <dlfcn.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>

#include "common/binding.h"
#include "common/parallel.h"
#include "cpu/ops.h"

namespace py = pybind11;
using namespace gen_fast;

namespace gen_fast {

// Whether AVX-512 and AMX are emulated, as in common/each_isa.h.
#if defined(GEN_FAST_EMULATED)
static constexpr bool EMULATED = true;
#else
static constexpr bool EMULATED = false;
#endif

#if defined(__x86_64__)
// What CPUID's leaf 7 says: not every compiler that has the instructions of a feature knows it as
// one of a processor.
struct Features {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Features(unsigned subleaf) { __get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx); }
};
#endif

static bool has_avx2_vnni() {
#if defined(GEN_FAST_AVX2_VNNI)
  return EMULATED || (Features(1).eax & 1u << 4);
#else
  return false;
#endif
}

static Isa isa_of_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::BASELINE;
  if (EMULATED) return Isa::AMX;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni"))) {
    return has_avx2_vnni() ? Isa::AVX2_VNNI : Isa::AVX2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::AVX512_VNNI;
#if defined(GEN_FAST_AMX)
  constexpr unsigned TILES_OF_BFLOAT16 = 1u << 22 | 1u << 24;  // AMX-BF16 and AMX-TILE
  if ((Features(0).edx & TILES_OF_BFLOAT16) == TILES_OF_BFLOAT16) return Isa::AMX;
#endif
  return Isa::AVX512;
#else
  return Isa::BASELINE;
#endif
}

// Asks for the registers of tiles, which a system saves only for processes that have asked: without
// that the first tile ends the process. It counts for all threads.
static bool ask_for_tiles() {
#if defined(GEN_FAST_EMULATED)
  return std::getenv("GEN_FAST_EMULATED_REFUSES_TILES") == nullptr;
#elif defined(__linux__) && defined(__x86_64__)
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

struct Detected {
  Isa isa;
  bool avx2_vnni;
  bool tiles_refused;  // the processor has tiles, but the system does not let us use them
};

static const Detected& detected() {
  static const Detected once = [] {
    const Isa isa = isa_of_processor();
    const bool refused = isa == Isa::AMX && !ask_for_tiles();
    return Detected{refused ? Isa::AVX512 : isa, has_avx2_vnni(), refused};
  }();
  return once;
}

static Isa limit = Isa::AMX;

Isa isa() {
  const Detected& here = detected();
  if (here.isa <= limit) return here.isa;
  if (EMULATED && limit == Isa::AVX2) return Isa::BASELINE;
  // All others are in a processor that has a better one.
  return limit == Isa::AVX2_VNNI && !here.avx2_vnni ? Isa::AVX2 : limit;
}

// Threads of what the calling thread runs from now on, in torch and in our ops. torch's own
// function also changes the number that threads begin with, and so other threads of the process.
static void limit_calling_thread(int threads) {
#if defined(_OPENMP)
  omp_set_num_threads(threads);
#endif
  // Where torch has a number from its user, a thread gives it to MKL when it begins, and MKL no
  // longer asks OpenMP.
  static const auto set_mkl_threads = []() -> int (*)(int) {
    void* torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
    void* function = torch ? dlsym(torch, "MKL_Set_Num_Threads_Local") : nullptr;
    return reinterpret_cast<int (*)(int)>(function);
  }();
  if (set_mkl_threads) set_mkl_threads(threads);
}

}  // namespace gen_fast

template <>
struct py::detail::type_caster<Dtype> : py::detail::dtype_caster<Dtype> {};

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ ops of gen_fast; see csrc/cpu/ops.h";
  Dtypes<Dtype>::learn({{"float32", Dtype::f32}, {"bfloat16", Dtype::bf16}});
  m.def("isa", [] { return (int)isa(); }, "of gen_fast::Isa");
  m.def("tiles_refused", [] { return detected().tiles_refused; },
        "whether the processor has AMX, but the system does not let this process use it");
  m.attr("emulated") = EMULATED;
  m.def("limit_isa", [](int isa) { limit = (Isa)isa; }, "for tests and benchmarks");
  m.def("limit_calling_thread", &limit_calling_thread,
        "threads of what this thread runs from now on; torch must have run in it before");
  m.def("add_rms_norm", exposed<add_rms_norm>);
  m.def("add_rms_norm_quantized", exposed<add_rms_norm_quantized>);
  m.def("add_rms_norm_backward", exposed<add_rms_norm_backward>);
  m.def("quantize_rows", exposed<quantize_rows>);
  m.def("int8_linear", [](Dtype dtype, Data q, Data scales, Data blocks, Data weight_scales,
                          Data bias, Data y, int64_t rows, int64_t in, int64_t out) {
    py::gil_scoped_release release;
    int8_linear(dtype, {at<int8_t>(q), at<float>(scales), at<int8_t>(blocks),
                        at<float>(weight_scales), at<void>(bias), at<void>(y), rows, in, out});
  });
  m.def("int8_weight", exposed<int8_weight>);
  m.def("group_linear", [](Dtype dtype, int bits, Data x, Data blocks, Data bias, Data y,
                           int64_t rows, int64_t in, int64_t out) {
    py::gil_scoped_release release;
    group_linear(dtype, {bits, at<void>(x), at<uint8_t>(blocks), at<void>(bias), at<void>(y), rows,
                         in, out});
  });
  m.def("group_weight", exposed<group_weight>);
  m.def("swiglu", exposed<swiglu>);
  m.def("swiglu_quantized", exposed<swiglu_quantized>);
  m.def("swiglu_backward", exposed<swiglu_backward>);
  m.def("rope", [](Dtype dtype, Data x, Data out, Data cos, Data sin, Data norm, int64_t x_stride,
                   int64_t out_stride, int64_t rows, int64_t heads, int64_t size, float eps) {
    py::gil_scoped_release release;
    rope(dtype, {nullptr, at<void>(x), at<void>(out), at<float>(cos), at<float>(sin),
                 at<void>(norm), 0, x_stride, out_stride, rows, heads, size, eps});
  });
  m.def("rope_backward", [](Dtype dtype, Data grad, Data x, Data out, Data cos, Data sin, Data norm,
                            int64_t grad_stride, int64_t x_stride, int64_t rows, int64_t heads,
                            int64_t size, float eps) {
    py::gil_scoped_release release;
    rope_backward(dtype, {at<void>(grad), at<void>(x), at<void>(out), at<float>(cos),
                          at<float>(sin), at<void>(norm), grad_stride, x_stride, heads * size, rows,
                          heads, size, eps});
  });
  m.def("append", exposed<append>);
  m.def("append_backward", exposed<append_backward>);
  m.def("pool", exposed<pool>);
  m.def("cross_entropy", exposed<cross_entropy>);
  m.def("dropout", [](Dtype dtype, Data x, Data text_keys, Data positions, Data out,
                      int64_t stride, int64_t rows, int64_t size, uint32_t first_kept, float scale,
                      uint64_t seed, uint32_t c2) {
    py::gil_scoped_release release;
    dropout(dtype, {at<void>(x), at<int32_t>(text_keys), at<int64_t>(positions), at<void>(out),
                    stride, rows, size, first_kept, scale, seed, c2});
  });
  py::class_<AttentionOptions>(m, "AttentionOptions")
      .def(py::init([](Data cu_seqlens_q, Data cu_seqlens_k, Data prefix_k, Data prefix_v,
                       Data blocks, Data text_keys, int64_t texts, int64_t prefix,
                       int64_t prefix_k_stride, int64_t prefix_v_stride, int64_t window, int mask,
                       uint64_t seed, int64_t layer, uint32_t first_kept, float kept_scale) {
        return AttentionOptions{at<int32_t>(cu_seqlens_q), at<int32_t>(cu_seqlens_k),
                                at<void>(prefix_k), at<void>(prefix_v), at<int32_t>(blocks),
                                at<int32_t>(text_keys), texts, prefix, prefix_k_stride,
                                prefix_v_stride, window, (Mask)mask, seed, layer, first_kept,
                                kept_scale};
      }));
  m.def("attention", [](const AttentionOptions& options, Dtype dtype, Data q, Data k, Data v,
                        Data out, Data lse, int64_t q_stride, int64_t k_stride, int64_t v_stride,
                        int64_t rows, int64_t heads, int64_t kv_heads, int64_t size) {
    py::gil_scoped_release release;
    attention(dtype, {options, at<void>(q), at<void>(k), at<void>(v), at<void>(out), at<float>(lse),
                      q_stride, k_stride, v_stride, rows, heads, kv_heads, size});
  });
  m.def("attention_backward", [](const AttentionOptions& options, Dtype dtype, Data q, Data k,
                                 Data v, Data out, Data lse, Data dout, Data dq, Data dk, Data dv,
                                 int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t rows,
                                 int64_t heads, int64_t kv_heads, int64_t size) {
    py::gil_scoped_release release;
    attention_backward(
        dtype,
        {options, at<void>(q), at<void>(k), at<void>(v), at<void>(out), at<float>(lse), q_stride,
         k_stride, v_stride, rows, heads, kv_heads, size},
        {at<void>(dout), at<void>(dq), at<void>(dk), at<void>(dv)});
  });
}
