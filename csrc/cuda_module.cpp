// gen_fast._cuda: the CUDA ops for Python. Tensors come as addresses; Python has checked them.
// The CUDA runtime is linked statically, so this imports on a machine without a GPU.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cuda/ops.h"

namespace py = pybind11;
using namespace gen_fast::cuda;

namespace {

typedef std::uintptr_t Address;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA ops of gen_fast; see csrc/cuda/ops.h";
  py::enum_<Dtype>(m, "Dtype")
      .value("f32", Dtype::f32)
      .value("bf16", Dtype::bf16)
      .value("f16", Dtype::f16);
  py::enum_<Store>(m, "Store")
      .value("plain", Store::plain)
      .value("int8", Store::int8)
      .value("fp8", Store::fp8);
  m.def("add_rms_norm", [](Dtype dtype, Store store, Address x, Address residual, Address weight,
                           Address total, Address out, Address scales, int64_t rows, int64_t size,
                           float eps, Address stream) {
    check(add_rms_norm(dtype, store, at<void>(x), at<void>(residual), at<void>(weight),
                       at<void>(total), at<void>(out), at<float>(scales), rows, size, eps,
                       at<void>(stream)));
  });
  m.def("append", [](Address table, Address special, Address ids, Address out, int64_t rows,
                     int64_t vocabulary, int64_t n_special, int64_t row_bytes, Address stream) {
    check(append(at<void>(table), at<void>(special), at<int64_t>(ids), at<void>(out), rows,
                 vocabulary, n_special, row_bytes, at<void>(stream)));
  });
  m.def("pool", [](Dtype dtype, Address hidden, Address cu_seqlens, Address norm_weight,
                   Address row_weights, Address out, int64_t texts, int64_t size, float eps,
                   Address stream) {
    check(pool(dtype, at<void>(hidden), at<int32_t>(cu_seqlens), at<void>(norm_weight),
               at<float>(row_weights), at<float>(out), texts, size, eps, at<void>(stream)));
  });
}
