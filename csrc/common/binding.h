// Functions over pointers as Python calls them: with tensors, which it has checked, or None.
//
// Without torch's headers, so that torch is not needed to build: a tensor is asked for its
// data_ptr(), as Python code would ask it, and a dtype is one of the objects that torch has.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

namespace gen_fast {

// Where the first element of a tensor lies; null for None. Python holds the tensor during the call.
struct Data {
  void* first;
};

template <class T>
T* at(Data data) {
  return static_cast<T*>(data.first);
}

// torch's dtypes and what an op calls them; a module learns them when it is imported.
template <class Dtype>
struct Dtypes {
  static inline std::vector<std::pair<PyObject*, Dtype>> known;

  static void learn(std::initializer_list<std::pair<const char*, Dtype>> names) {
    const auto torch = pybind11::module_::import("torch");
    for (const auto& [name, dtype] : names)
      known.emplace_back(pybind11::object(torch.attr(name)).release().ptr(), dtype);
  }
};

// What Python gives for a parameter, and how it becomes one.
template <class T>
struct Parameter {
  typedef T Given;
  static T of(T given) { return given; }
};

template <class T>
struct Parameter<T*> {
  typedef Data Given;
  static T* of(Data given) { return at<T>(given); }
};

template <auto function>
struct Exposed;

template <class Result, class... P, Result (*function)(P...)>
struct Exposed<function> {
  // A text that `function` returns is an error.
  static constexpr bool returns_error = std::is_same<Result, const char*>::value;
  typedef std::conditional_t<returns_error, void, Result> Returned;

  static Returned call(typename Parameter<P>::Given... given) {
    pybind11::gil_scoped_release release;
    if constexpr (returns_error) {
      const char* error = function(Parameter<P>::of(given)...);
      if (error) throw std::runtime_error(error);
    } else {
      return function(Parameter<P>::of(given)...);
    }
  }
};

// `function` for pybind11, run without the interpreter's lock.
template <auto function>
constexpr auto exposed = &Exposed<function>::call;

}  // namespace gen_fast

namespace pybind11::detail {

template <>
struct type_caster<gen_fast::Data> {
  PYBIND11_TYPE_CASTER(gen_fast::Data, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    value.first = nullptr;
    if (source.is_none()) return true;
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    const auto address =
        reinterpret_steal<object>(PyObject_CallMethodNoArgs(source.ptr(), name));
    if (address) value.first = PyLong_AsVoidPtr(address.ptr());
    if (!PyErr_Occurred()) return true;
    // What is no tensor: a TypeError will name the arguments. What a tensor says goes through.
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw error_already_set();
    PyErr_Clear();
    return false;
  }
};

template <class Dtype>
struct dtype_caster {
  PYBIND11_TYPE_CASTER(Dtype, const_name("torch.dtype"));

  bool load(handle source, bool) {
    for (const auto& [object, dtype] : gen_fast::Dtypes<Dtype>::known) {
      if (object != source.ptr()) continue;
      value = dtype;
      return true;
    }
    return false;
  }
};

}  // namespace pybind11::detail
