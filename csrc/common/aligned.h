// Vectors that begin at a cache line. Others begin 16 bytes after one, or at any of four places in
// one: then every vector register of 64 bytes is read and written in two lines.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace gen_fast {

template <class T>
struct LineAllocator {
  typedef T value_type;
  static constexpr std::align_val_t LINE{64};
  LineAllocator() = default;
  template <class Other>
  LineAllocator(const LineAllocator<Other>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
  void deallocate(T* p, size_t) { ::operator delete(p, LINE); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};

template <class T>
using LineVector = std::vector<T, LineAllocator<T>>;

}  // namespace gen_fast
