// Dropout of rows: what is kept follows from seed, stream, text, row and column alone.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/dropout.cpp"
#include "cpu/ops.h"
#include "common/each_isa.h"

namespace gen_fast {

void dropout(Dtype dtype, const DropoutArguments& arguments) {
  GEN_FAST_DISPATCH(dropout)(dtype == Dtype::bf16, arguments);
}

}  // namespace gen_fast

#else
#include "common/vector.h"
#include "common/philox.h"

namespace gen_fast::GEN_FAST_ISA {

template <class T>
static void drop_row(const DropoutArguments& args, const Philox& philox, int64_t r) {
  const T* x = (const T*)args.x + r * args.stride;
  T* out = (T*)args.out + r * args.size;
  const Row row(philox, (uint32_t)args.positions[r], args.c2);
  const uint32_t key = (uint32_t)args.text_keys[r];
  for (int64_t begin = 0; begin < args.size; begin += 4 * W) {
    const uint32_t counter = (uint32_t)(begin / 4);
    const Columns columns[] = {{philox, key, counter}, {philox, key, counter + W / 2}};
    each_mask(philox, columns, row, 4 * W, [&](int j, vu mask) {
      const int64_t i = begin + j;
      if (i + W <= args.size) return store(out + i, keep(load(x + i) * args.scale, mask));
      if (i >= args.size) return;
      T rest[W] = {};
      std::memcpy(rest, x + i, (args.size - i) * sizeof(T));
      store(rest, keep(load(rest) * args.scale, mask));
      std::memcpy(out + i, rest, (args.size - i) * sizeof(T));
    });
  }
}

template <class T>
static void drop_rows(const DropoutArguments& args) {
  const Philox philox(args.seed, args.first_kept);
  parallel_for(args.rows, rows_worth_a_thread(args.size), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) drop_row<T>(args, philox, r);
  });
}

static void dropout(bool is_bf16, const DropoutArguments& args) {
  (is_bf16 ? drop_rows<bf16> : drop_rows<float>)(args);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
