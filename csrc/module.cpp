// gen_fast._C: the C++ ops for Python. Tensors come as addresses; Python has checked them.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>

#include "common/parallel.h"
#include "cpu/ops.h"

namespace py = pybind11;

namespace gen_fast {

// Whether AVX-512 and AMX are emulated, as in common/each_isa.h.
#if defined(GEN_FAST_EMULATED)
static constexpr bool EMULATED = true;
#else
static constexpr bool EMULATED = false;
#endif

static bool has_avx2_vnni() {
#if defined(GEN_FAST_AVX2_VNNI)
  if (EMULATED) return true;
  // Not every compiler that has its instructions knows it as a feature of a processor.
  unsigned eax = 0, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 4);
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
  if (__builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16")) return Isa::AMX;
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

namespace {

typedef std::uintptr_t Address;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

gen_fast::Dtype dtype(bool bf16) { return bf16 ? gen_fast::Dtype::bf16 : gen_fast::Dtype::f32; }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ ops of gen_fast; see csrc/cpu/ops.h";
  m.def("isa", [] { return (int)gen_fast::isa(); }, "of gen_fast::Isa");
  m.def("tiles_refused", [] { return gen_fast::detected().tiles_refused; },
        "whether the processor has AMX, but the system does not let this process use it");
  m.attr("emulated") = gen_fast::EMULATED;
  m.def("limit_isa", [](int isa) { gen_fast::limit = (gen_fast::Isa)isa; },
        "for tests and benchmarks");
  m.def("limit_calling_thread", &gen_fast::limit_calling_thread,
        "threads of what this thread runs from now on; torch must have run in it before");
  m.def("add_rms_norm", [](bool bf16, Address x, Address residual, Address weight, Address total,
                           Address out, int64_t rows, int64_t size, float eps) {
    py::gil_scoped_release release;
    gen_fast::add_rms_norm(dtype(bf16), at<void>(x), at<void>(residual), at<void>(weight),
                           at<void>(total), at<void>(out), rows, size, eps);
  });
  m.def("add_rms_norm_quantized", [](bool bf16, Address x, Address residual, Address weight,
                                     Address total, Address out, Address scales, int64_t rows,
                                     int64_t size, float eps, bool rotated) {
    py::gil_scoped_release release;
    gen_fast::add_rms_norm_quantized(dtype(bf16), at<void>(x), at<void>(residual),
                                     at<void>(weight), at<void>(total), at<int8_t>(out),
                                     at<float>(scales), rows, size, eps, rotated);
  });
  m.def("add_rms_norm_backward", [](bool bf16, Address grad_normed, Address grad_total,
                                    Address total, Address weight, Address out, int64_t rows,
                                    int64_t size, float eps) {
    py::gil_scoped_release release;
    gen_fast::add_rms_norm_backward(dtype(bf16), at<void>(grad_normed), at<void>(grad_total),
                                    at<void>(total), at<void>(weight), at<void>(out), rows, size,
                                    eps);
  });
  m.def("quantize_rows", [](bool bf16, Address x, Address out, Address scales, int64_t rows,
                            int64_t size, bool rotated) {
    py::gil_scoped_release release;
    gen_fast::quantize_rows(dtype(bf16), at<void>(x), at<int8_t>(out), at<float>(scales), rows,
                            size, rotated);
  });
  m.def("int8_linear", [](bool bf16, Address q, Address scales, Address blocks,
                          Address weight_scales, Address bias, Address y, int64_t rows,
                          int64_t in, int64_t out) {
    py::gil_scoped_release release;
    gen_fast::int8_linear(dtype(bf16), {at<int8_t>(q), at<float>(scales), at<int8_t>(blocks),
                                        at<float>(weight_scales), at<void>(bias), at<void>(y),
                                        rows, in, out});
  });
  m.def("int8_weight", [](bool bf16, Address blocks, Address scales, Address weight, int64_t in,
                          int64_t out) {
    py::gil_scoped_release release;
    gen_fast::int8_weight(dtype(bf16), at<int8_t>(blocks), at<float>(scales), at<void>(weight), in,
                          out);
  });
  m.def("group_linear", [](int bits, bool bf16, Address x, Address blocks, Address bias,
                           Address y, int64_t rows, int64_t in, int64_t out) {
    py::gil_scoped_release release;
    gen_fast::group_linear(dtype(bf16), {bits, at<void>(x), at<uint8_t>(blocks), at<void>(bias),
                                         at<void>(y), rows, in, out});
  });
  m.def("group_weight", [](int bits, bool bf16, Address blocks, Address weight, int64_t in,
                           int64_t out) {
    py::gil_scoped_release release;
    gen_fast::group_weight(dtype(bf16), bits, at<uint8_t>(blocks), at<void>(weight), in, out);
  });
  m.def("swiglu", [](bool bf16, Address gate_up, Address out, int64_t rows, int64_t size) {
    py::gil_scoped_release release;
    gen_fast::swiglu(dtype(bf16), at<void>(gate_up), at<void>(out), rows, size);
  });
  m.def("swiglu_quantized", [](bool bf16, Address gate_up, Address out, Address scales,
                               int64_t rows, int64_t size, bool rotated) {
    py::gil_scoped_release release;
    gen_fast::swiglu_quantized(dtype(bf16), at<void>(gate_up), at<int8_t>(out), at<float>(scales),
                               rows, size, rotated);
  });
  m.def("swiglu_backward", [](bool bf16, Address grad, Address gate_up, Address out, int64_t rows,
                              int64_t size) {
    py::gil_scoped_release release;
    gen_fast::swiglu_backward(dtype(bf16), at<void>(grad), at<void>(gate_up), at<void>(out), rows,
                              size);
  });
  m.def("rope", [](bool bf16, Address x, int64_t x_stride, Address out, int64_t out_stride,
                   Address cos, Address sin, Address norm, int64_t rows, int64_t heads,
                   int64_t size, float eps) {
    py::gil_scoped_release release;
    gen_fast::RopeArguments a = {};
    a.x = at<void>(x), a.out = at<void>(out), a.x_stride = x_stride, a.out_stride = out_stride;
    a.cos = at<float>(cos), a.sin = at<float>(sin), a.norm = at<void>(norm);
    a.rows = rows, a.heads = heads, a.size = size, a.eps = eps;
    gen_fast::rope(dtype(bf16), a);
  });
  m.def("rope_backward", [](bool bf16, Address grad, int64_t grad_stride, Address x,
                            int64_t x_stride, Address out, Address cos, Address sin, Address norm,
                            int64_t rows, int64_t heads, int64_t size, float eps) {
    py::gil_scoped_release release;
    gen_fast::RopeArguments a = {};
    a.grad = at<void>(grad), a.x = at<void>(x), a.out = at<void>(out);
    a.grad_stride = grad_stride, a.x_stride = x_stride, a.out_stride = heads * size;
    a.cos = at<float>(cos), a.sin = at<float>(sin), a.norm = at<void>(norm);
    a.rows = rows, a.heads = heads, a.size = size, a.eps = eps;
    gen_fast::rope_backward(dtype(bf16), a);
  });
  m.def("append", [](Address table, Address special, Address ids, Address out, int64_t rows,
                     int64_t vocabulary, int64_t n_special, int64_t row_bytes) {
    py::gil_scoped_release release;
    return gen_fast::append(at<void>(table), at<void>(special), at<int64_t>(ids), at<void>(out),
                            rows, vocabulary, n_special, row_bytes);
  });
  m.def("append_backward", [](bool bf16, Address grad, Address ids, Address out, int64_t rows,
                              int64_t vocabulary, int64_t n_special, int64_t size) {
    py::gil_scoped_release release;
    gen_fast::append_backward(dtype(bf16), at<void>(grad), at<int64_t>(ids), at<float>(out), rows,
                              vocabulary, n_special, size);
  });
  m.def("pool", [](bool bf16, Address hidden, Address cu_seqlens, Address norm_weight,
                   Address row_weights, Address out, int64_t texts, int64_t size, float eps) {
    py::gil_scoped_release release;
    gen_fast::pool(dtype(bf16), at<void>(hidden), at<int32_t>(cu_seqlens), at<void>(norm_weight),
                   at<float>(row_weights), at<float>(out), texts, size, eps);
  });
  m.def("cross_entropy", [](bool bf16, Address logits, Address targets, Address losses,
                            int64_t rows, int64_t vocabulary) {
    py::gil_scoped_release release;
    return gen_fast::cross_entropy(dtype(bf16), at<void>(logits), at<int64_t>(targets),
                            at<float>(losses), rows, vocabulary);
  });
  m.def("dropout", [](bool bf16, Address x, int64_t stride, Address text_keys, Address positions,
                      Address out, int64_t rows, int64_t size, uint32_t first_kept, float scale,
                      uint64_t seed, uint32_t c2) {
    py::gil_scoped_release release;
    gen_fast::dropout(dtype(bf16), {at<void>(x), stride, at<int32_t>(text_keys),
                                    at<int64_t>(positions), at<void>(out), rows, size, first_kept,
                                    scale, seed, c2});
  });
  py::class_<gen_fast::AttentionOptions>(m, "AttentionOptions")
      .def(py::init([](Address cu_seqlens_q, Address cu_seqlens_k, int64_t texts, Address prefix_k,
                       Address prefix_v, int64_t prefix, int64_t prefix_k_stride,
                       int64_t prefix_v_stride, int64_t window, int mask, Address blocks,
                       Address text_keys, uint64_t seed, int64_t layer, uint32_t first_kept,
                       float kept_scale) {
        return gen_fast::AttentionOptions{at<int32_t>(cu_seqlens_q), at<int32_t>(cu_seqlens_k),
                                          texts, at<void>(prefix_k), at<void>(prefix_v), prefix,
                                          prefix_k_stride, prefix_v_stride, window,
                                          (gen_fast::Mask)mask, at<int32_t>(blocks),
                                          at<int32_t>(text_keys), seed, layer, first_kept,
                                          kept_scale};
      }));
  m.def("attention", [](const gen_fast::AttentionOptions& options, bool bf16, Address q, Address k,
                        Address v, int64_t q_stride, int64_t k_stride, int64_t v_stride,
                        Address out, Address lse, int64_t rows, int64_t heads, int64_t kv_heads,
                        int64_t size) {
    py::gil_scoped_release release;
    gen_fast::attention(dtype(bf16), {options, at<void>(q), at<void>(k), at<void>(v), q_stride,
                                      k_stride, v_stride, at<void>(out), at<float>(lse), rows,
                                      heads, kv_heads, size});
  });
  m.def("attention_backward", [](const gen_fast::AttentionOptions& options, bool bf16, Address q,
                                 Address k, Address v, int64_t q_stride, int64_t k_stride,
                                 int64_t v_stride, Address out, Address lse, int64_t rows,
                                 int64_t heads, int64_t kv_heads, int64_t size, Address dout,
                                 Address dq, Address dk, Address dv) {
    py::gil_scoped_release release;
    gen_fast::attention_backward(
        dtype(bf16), {options, at<void>(q), at<void>(k), at<void>(v), q_stride, k_stride, v_stride,
                      at<void>(out), at<float>(lse), rows, heads, kv_heads, size},
        {at<void>(dout), at<void>(dq), at<void>(dk), at<void>(dv)});
  });
}
