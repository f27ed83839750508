// gen_fast._cuda: the CUDA ops for Python. Python has checked its tensors.
// The CUDA runtime is linked statically, so this imports on a machine without a GPU.
#include "common/binding.h"
#include "cuda/ops.h"

namespace py = pybind11;
using namespace gen_fast;
using namespace gen_fast::cuda;

template <>
struct py::detail::type_caster<Dtype> : py::detail::dtype_caster<Dtype> {};

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA ops of gen_fast; see csrc/cuda/ops.h";
  Dtypes<Dtype>::learn(
      {{"float32", Dtype::f32}, {"bfloat16", Dtype::bf16}, {"float16", Dtype::f16}});
  py::enum_<Store>(m, "Store")
      .value("plain", Store::plain)
      .value("int8", Store::int8)
      .value("fp8", Store::fp8);
  m.def("add_rms_norm", exposed<add_rms_norm>);
  m.def("append", exposed<append>);
  m.def("pool", exposed<pool>);
}
