// Gradients of packed attention: those of q, and of each text's own k and v.
//
// A task is a text and a key/value head, so that no two tasks write the same gradient. Query rows
// (all heads of the group) go in chunks, keys in blocks of 64; for each pair, with P the softmax
// weights remade from the log-sum-exp and delta = sum(dO · O) of a row:
//   S = Q · Kᵀ    dP = dO · Vᵀ    dS = P · (dP - delta)
//   dQ += dS · K    dV += Pᵀ · dO    dK += dSᵀ · Q
// On AMX the last two are dVᵀ += dOᵀ · P and dKᵀ += Qᵀ · dS: P and dS then lie as the right side of a
// product on tiles wants them, and dO and Q are transposed once a chunk.
// With dropout, dP and the P of dV are 0 where a weight was dropped, and scaled elsewhere.
// Source: Dao, arXiv 2307.08691, algorithm 2.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/attention_backward.cpp"
#define GEN_FAST_WITH_AMX
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/aligned.h"
#include "cpu/ops.h"
#include "common/each_isa.h"

namespace gen_fast {

void attention_backward(Dtype dtype, const AttentionArguments& arguments,
                        const AttentionGradients& gradients) {
  GEN_FAST_DISPATCH(attention_backward)(dtype == Dtype::bf16, arguments, gradients);
}

}  // namespace gen_fast

#else
#include "common/vector.h"
#include "common/product.h"
#include "common/philox.h"
#include "common/keys.h"

namespace gen_fast::GEN_FAST_ISA {
namespace backward {

// Working memory of a task. "paired" is the layout of a product's right side, [n / pair][D][pair].
// Nothing is ever written between D and depth or padded.
template <class Op>
struct Workspace {
  typedef typename Op::type T;
  int64_t most;                 // rows of a chunk, rounded up to steps
  int64_t size, depth, padded;  // D, D rounded up to steps and to whole vectors
  Memory<T> q, dout;                // [most, depth]
  Memory<T> q_paired, dout_paired;  // [most / pair][padded][pair]
  Memory<T> q_t, dout_t;            // with tiles instead: [padded, most]
  Memory<T> keys_t, values_t;       // [depth / pair][KEYS][pair]
  Memory<T> keys_paired;            // [KEYS / pair][padded][pair]
  Memory<T> weights, dscores;       // paired, [most / pair][KEYS][pair]
  Memory<T> dscores_rows;           // [ROWS, KEYS]
  Memory<float> scores, dweights;   // [ROWS, KEYS]
  Memory<uint32_t> masks;           // [ROWS, KEYS], for dropout
  Memory<float> lse, delta;         // [most]
  Memory<float> dq;                 // [most, padded]
  Memory<float> dk, dv;             // [keys of the text, padded]; with tiles [blocks, padded, KEYS]

  Workspace(int64_t rows, int64_t d)
      : most(rounded_up(rows, STEP)),
        size(d),
        depth(rounded_up(d, STEP)),
        padded((d + W - 1) / W * W),
        q(most * depth),
        dout(most * depth),
        q_paired(TILES ? 0 : most * padded),
        dout_paired(TILES ? 0 : most * padded),
        q_t(TILES ? padded * most : 0),
        dout_t(TILES ? padded * most : 0),
        keys_t(depth * KEYS),
        values_t(depth * KEYS),
        keys_paired(KEYS * padded),
        weights(most * KEYS),
        dscores(most * KEYS),
        dscores_rows(ROWS * KEYS),
        scores(ROWS * KEYS),
        dweights(ROWS * KEYS),
        masks(ROWS * KEYS),
        lse(most),
        delta(most),
        dq(most * padded) {}
};

// Vectors of floats into the same rows of a matrix with KEYS columns, from column j.
template <class Op>
static inline void put_vectors(typename Op::type* to, int64_t row, int64_t j, vf first, vf second) {
  typename Op::type narrow[2 * W];
  store(narrow, first);
  store(narrow + W, second);
  put_rows<Op>(to + j * Op::pair, row, KEYS, narrow, narrow + W, W);
}

// Rows first … end - 1, whole pairs, have neither weights nor score gradients.
template <class Op>
static void clear_rows(Workspace<Op>& work, int64_t first, int64_t end) {
  for (int64_t r = first; r < end; r += 2) {
    for (int64_t j = 0; j < KEYS; j += W) {
      put_vectors<Op>(work.weights.data(), r, j, vf{}, vf{});
      put_vectors<Op>(work.dscores.data(), r, j, vf{}, vf{});
    }
  }
}

// Weights and score gradients of `rows` rows against the packed block, of which row i sees seen[i];
// adds to the gradient of q. dropout: null for none; the weights are those kept, not yet scaled.
// With tiles the rows up to a whole tile get a gradient too, which nothing reads.
template <class Op, class Count>
static void differentiate_rows(Workspace<Op>& work, int64_t row, Count rows, const Seen* seen,
                               float scale, const Dropout* dropout, float kept_scale) {
  const int64_t depth = Op::pair == 2 ? work.depth : work.size;
  // Keys that no row of the tile sees, in whole vectors, are left out: half of a diagonal block.
  int furthest = 0;
  for (int i = 0; i < rows; ++i) furthest = seen[i].last > furthest ? seen[i].last : furthest;
  const int columns = (furthest + W - 1) / W * W;
  product<Op, Count, false>(work.q.data() + row * work.depth, work.depth, work.keys_t.data(), KEYS,
                            columns, depth, work.scores.data(), KEYS);
  product<Op, Count, false>(work.dout.data() + row * work.depth, work.depth, work.values_t.data(),
                            KEYS, columns, depth, work.dweights.data(), KEYS);
  for (int i = 0; i < rows; ++i) seen[i].hide(work.scores.data() + i * KEYS, columns);
  const auto differentiate_weights = [&](auto dropping) {
    for (int i = 0; i < rows; i += 2) {
      for (int j = 0; j < KEYS; j += W) {
        vf weight[2] = {}, change[2] = {};  // of hidden keys, and of a row beyond the last: nothing
        for (int r = 0; r < 2 && i + r < rows && j < columns; ++r) {
          const int64_t at = (i + r) * KEYS + j, of = row + i + r;
          const uint32_t* masks = work.masks.data() + at;
          vf dweight = load(work.dweights.data() + at);
          if constexpr (dropping) dweight = keep(dweight * kept_scale, masks);
          weight[r] = exp2(load(work.scores.data() + at) * scale - work.lse[of]);
          change[r] = weight[r] * (dweight - work.delta[of]);
          store(work.dscores_rows.data() + at, change[r]);
          if constexpr (dropping) weight[r] = keep(weight[r], masks);
        }
        put_vectors<Op>(work.weights.data(), row + i, j, weight[0], weight[1]);
        put_vectors<Op>(work.dscores.data(), row + i, j, change[0], change[1]);
      }
    }
  };
  if (dropout) {
    for (int i = 0; i < rows; ++i) dropout->put_masks(i, columns, work.masks.data() + i * KEYS);
    differentiate_weights(std::true_type());
  } else {
    differentiate_weights(std::false_type());
  }
  const int64_t keys = rounded_up(furthest, STEP);
  if constexpr (TILES) {
    for (int i = 0; i < rows; ++i) {
      for (int64_t j = columns; j < keys; j += W) {
        store(work.dscores_rows.data() + i * KEYS + j, vf{});
      }
    }
  }
  product<Op, Count, true>(work.dscores_rows.data(), KEYS, work.keys_paired.data(), work.padded,
                           work.padded, keys, work.dq.data() + row * work.padded, work.padded);
}

#if defined(GEN_FAST_TILES)
// to [padded, KEYS] += left [padded, most] · right, paired, over the rows first … end - 1 of right, of
// which `count` columns count.
static void add_product(const Memory<bf16>& left, const Memory<bf16>& right, int64_t most,
                        int64_t padded, int64_t first, int64_t end, int64_t count, float* to) {
  for (int64_t i = 0; i < padded; i += ROWS) {
    product<PairOperand, int, true>(left.data() + i * most + first, most,
                                    right.data() + first * KEYS, KEYS, count, end - first,
                                    to + i * KEYS, KEYS);
  }
}
#else
// to [count, D] += leftᵀ · right over the rows first … end - 1 of both, paired.
template <class Op>
static void add_transposed(const Memory<typename Op::type>& left,
                           const Memory<typename Op::type>& right, int64_t padded,
                           int64_t first, int64_t end, int64_t count, float* to) {
  const auto* a = left.data() + first * KEYS;
  const auto* b = right.data() + first * padded;
  int64_t i = 0;
  for (; i + ROWS <= count; i += ROWS) {
    product<Op, ROWS, true, KEYS>(a + i * Op::pair, Op::pair, b, padded, padded, end - first,
                                  to + i * padded, padded);
  }
  for (; i < count; ++i) {
    product<Op, 1, true, KEYS>(a + i * Op::pair, Op::pair, b, padded, padded, end - first,
                               to + i * padded, padded);
  }
}
#endif

// A chunk of query rows of one text, with the position of its first token, prefix included.
struct Chunk {
  int64_t rows, group, position;
  TextMask mask;
};

// The chunk against keys [0, n_keys) at positions base, base + 1, …; dk is null for a prefix, and
// dropout where there is none.
template <class Op, class In>
static void differentiate_keys(Workspace<Op>& work, const Chunk& chunk, const In* k,
                               int64_t k_stride, const In* v, int64_t v_stride, int64_t n_keys,
                               int64_t base, float scale, float* dk, float* dv,
                               Dropout* dropout, float kept_scale) {
  const int64_t d = work.size;
  n_keys = chunk.mask.reach(chunk.position + (chunk.rows - 1) / chunk.group, base, n_keys);
  for (int64_t block = 0; block < n_keys; block += KEYS) {
    const int64_t count = n_keys - block < KEYS ? n_keys - block : KEYS;
    put_columns<Op>(work.keys_t.data(), k + block * k_stride, k_stride, count, d);
    put_columns<Op>(work.values_t.data(), v + block * v_stride, v_stride, count, d);
    put_block_of_rows<Op>(work.keys_paired.data(), work.padded, k + block * k_stride, k_stride,
                          count, d);
    if (dropout) dropout->go_to_block(block);
    int64_t seeing = chunk.rows;  // the first row that sees any of these keys, rounded to steps
    for (int64_t row = 0; row < chunk.rows; row += ROWS) {
      const int64_t n = chunk.rows - row < ROWS ? chunk.rows - row : ROWS;
      Seen seen[ROWS];
      bool any = false;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t position = chunk.position + (row + r) / chunk.group;
        seen[r] = chunk.mask.seen(position, base + block, count);
        any |= seen[r].any();
      }
      if (any) {
        if (seeing == chunk.rows) {
          seeing = row / STEP * STEP;
          clear_rows(work, seeing, row);
        }
        if (dropout) dropout->go_to_rows(n, row, chunk.position, chunk.group);
        with_rows(n, [&](auto m) {
          differentiate_rows(work, row, m, seen, scale, dropout, kept_scale);
        });
      } else if (seeing != chunk.rows) {
        // None of these keys: no weight, but within the rows that are summed below.
        clear_rows(work, row, row + n);
      }
    }
    if (dk == nullptr || seeing == chunk.rows) continue;
#if defined(GEN_FAST_TILES)
    const int64_t end = rounded_up(chunk.rows, STEP);  // differentiate_text has cleared the others
    add_product(work.dout_t, work.weights, work.most, work.padded, seeing, end, count,
                dv + block * work.padded);
    add_product(work.q_t, work.dscores, work.most, work.padded, seeing, end, count,
                dk + block * work.padded);
#else
    // An odd last row has one of no weight beside it.
    const int64_t end = (chunk.rows + Op::pair - 1) / Op::pair * Op::pair;
    add_transposed<Op>(work.weights, work.dout_paired, work.padded, seeing, end, count,
                       dv + block * work.padded);
    add_transposed<Op>(work.dscores, work.q_paired, work.padded, seeing, end, count,
                       dk + block * work.padded);
#endif
  }
}

template <class In>
static void write_rows(In* to, int64_t stride, const float* from, int64_t padded, int64_t n,
                       int64_t d, float factor) {
  for (int64_t r = 0; r < n; ++r) {
    int64_t i = 0;
    for (; i + W <= d; i += W) store(to + r * stride + i, load(from + r * padded + i) * factor);
    for (; i < d; ++i) assign(to + r * stride + i, from[r * padded + i] * factor);
  }
}

// The gradient of a text's keys or values, as the products have left it in `from`.
template <class Op, class In>
static void write_keys(Workspace<Op>& work, In* to, int64_t stride, const Memory<float>& from,
                       int64_t n_keys, float factor) {
  const int64_t d = work.size, padded = work.padded;
  if constexpr (!TILES) return write_rows(to, stride, from.data(), padded, n_keys, d, factor);
  for (int64_t key = 0; key < n_keys; key += ROWS) {
    const int64_t n = n_keys - key < ROWS ? n_keys - key : ROWS;
    const float* columns = from.data() + key / KEYS * KEYS * padded + key % KEYS;
    for (int64_t i = 0; i < d; i += KEYS) {
      const int64_t width = d - i < KEYS ? d - i : KEYS;
      float* rows = work.scores.data();  // [ROWS, KEYS]; free again
      put_columns<FloatOperand>(rows, columns + i * KEYS, KEYS, width, n);
      write_rows(to + key * stride + i, stride, rows, KEYS, n, width, factor);
    }
  }
}

template <class Op, class In>
static void differentiate_text(const AttentionArguments& args, const AttentionGradients& grads,
                               Workspace<Op>& work, int64_t text, int64_t kv_head,
                               const Philox* philox) {
  const int64_t q0 = args.cu_seqlens_q[text], q1 = args.cu_seqlens_q[text + 1];
  const int64_t k0 = args.cu_seqlens_k[text], n_keys = args.cu_seqlens_k[text + 1] - k0;
  const int64_t d = args.size, group = args.heads / args.kv_heads, padded = work.padded;
  if (q1 == q0) return;  // the gradients of its keys stay zero
  const float root = 1.0f / std::sqrt((float)d), scale = LOG2_E * root;
  std::optional<Dropout> dropout;
  if (philox) dropout.emplace(*philox, args, text, kv_head * group);
  const int64_t places = TILES ? rounded_up(n_keys, KEYS) : n_keys;
  work.dk.assign(places * padded, 0.0f);
  work.dv.assign(places * padded, 0.0f);
  const int64_t tokens = tokens_of_chunk(group);
  for (int64_t token = q0; token < q1; token += tokens) {
    const int64_t end = token + tokens < q1 ? token + tokens : q1;
    const Chunk chunk{(end - token) * group, group, args.prefix + n_keys - (q1 - token),
                      TextMask(args, text)};
    std::fill(work.dq.begin(), work.dq.end(), 0.0f);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const int64_t head = (token + r / group) * args.heads + kv_head * group + r % group;
      const In* q = (const In*)args.q + (token + r / group) * args.q_stride +
                    (kv_head * group + r % group) * d;
      const In* dout = (const In*)grads.dout + head * d;
      const In* out = (const In*)args.out + head * d;
      copy_row(work.q.data() + r * work.depth, q, d);
      copy_row(work.dout.data() + r * work.depth, dout, d);
      vf products = {};
      int64_t i = 0;
      for (; i + W <= d; i += W) products += load(dout + i) * load(out + i);
      float delta = sum(products);
      for (; i < d; ++i) delta += to_float(dout[i]) * to_float(out[i]);
      work.delta[r] = delta;
      work.lse[r] = args.lse[head] * LOG2_E;
    }
#if defined(GEN_FAST_TILES)
    put_transposed(work.q_t.data(), work.most, work.q.data(), work.depth, chunk.rows, padded);
    put_transposed(work.dout_t.data(), work.most, work.dout.data(), work.depth, chunk.rows, padded);
    clear_rows(work, rounded_up(chunk.rows, 2), rounded_up(chunk.rows, STEP));
#else
    for (int64_t r = 0; r < chunk.rows; r += 2) {
      const int64_t next = r + 1 < chunk.rows ? r + 1 : r, depth = work.depth;
      const auto *q = work.q.data(), *dout = work.dout.data();
      put_rows<Op>(work.q_paired.data(), r, padded, q + r * depth, q + next * depth, d);
      put_rows<Op>(work.dout_paired.data(), r, padded, dout + r * depth, dout + next * depth, d);
    }
#endif
    const auto differentiate = [&](const void* k, int64_t k_stride, const void* v,
                                   int64_t v_stride, int64_t from, int64_t n, int64_t base,
                                   float* dk, float* dv) {
      differentiate_keys<Op>(work, chunk, (const In*)k + from * k_stride + kv_head * d, k_stride,
                             (const In*)v + from * v_stride + kv_head * d, v_stride, n, base, scale,
                             dk, dv, dropout ? &*dropout : nullptr, args.kept_scale);
    };
    if (args.prefix) {
      differentiate(args.prefix_k, args.prefix_k_stride, args.prefix_v, args.prefix_v_stride, 0,
                    args.prefix, 0, nullptr, nullptr);
    }
    differentiate(args.k, args.k_stride, args.v, args.v_stride, k0, n_keys, args.prefix,
                  work.dk.data(), work.dv.data());
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const int64_t head = (token + r / group) * args.heads + kv_head * group + r % group;
      write_rows((In*)grads.dq + head * d, 0, work.dq.data() + r * padded, padded, 1, d, root);
    }
  }
  const int64_t stride = args.kv_heads * d, first = k0 * stride + kv_head * d;
  write_keys(work, (In*)grads.dk + first, stride, work.dk, n_keys, root);
  write_keys(work, (In*)grads.dv + first, stride, work.dv, n_keys, args.kept_scale);
}

template <class Op, class In>
static void run(const AttentionArguments& args, const AttentionGradients& grads) {
  const int64_t group = args.heads / args.kv_heads, rows = tokens_of_chunk(group) * group;
  const int64_t keys = args.cu_seqlens_k[args.texts] + args.prefix;
  const int64_t queries = args.cu_seqlens_q[args.texts];
  const int64_t elements = (queries * args.heads + keys * args.kv_heads) * args.size;
  std::optional<Philox> philox;
  if (args.text_keys) philox.emplace(args.seed, args.first_kept);
  parallel_tasks(args.texts * args.kv_heads, elements, [&](int64_t task) {
    [[maybe_unused]] const Tiles tiles{};
    // One workspace a thread, kept between calls: sized by the model and its longest text so far.
    static thread_local std::unique_ptr<Workspace<Op>> work;
    if (!work || work->size != args.size || work->most < rows) {
      work.reset(new Workspace<Op>(rows, args.size));
    }
    differentiate_text<Op, In>(args, grads, *work, task / args.kv_heads, task % args.kv_heads,
                               philox ? &*philox : nullptr);
  });
}

}  // namespace backward

static void attention_backward(bool is_bf16, const AttentionArguments& args,
                               const AttentionGradients& grads) {
#if defined(GEN_FAST_TILES)
  is_bf16 ? backward::run<PairOperand, bf16>(args, grads)
          : avx512::attention_backward(false, args, grads);
#elif defined(GEN_FAST_BF16_DOT)
  is_bf16 ? backward::run<PairOperand, bf16>(args, grads)
          : backward::run<FloatOperand, float>(args, grads);
#else
  is_bf16 ? backward::run<FloatOperand, bf16>(args, grads)
          : backward::run<FloatOperand, float>(args, grads);
#endif
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
