// Gradients of packed causal attention: those of q, and of each text's own k and v.
//
// A task is a text and a key/value head, so that no two tasks write the same gradient. Query rows
// (all heads of the group) go in chunks, keys in blocks of 64; for each pair, with P the softmax
// weights remade from the log-sum-exp and delta = sum(dO · O) of a row:
//   S = Q · Kᵀ    dP = dO · Vᵀ    dS = P · (dP - delta)
//   dQ += dS · K    dV += Pᵀ · dO    dK += dSᵀ · Q
// Source: Dao, arXiv 2307.08691, algorithm 2.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/attention_backward.cpp"
#include <memory>
#include <vector>

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

namespace gen_fast::GEN_FAST_ISA {
namespace backward {

constexpr int KEYS = 64;    // keys in a block
constexpr int CHUNK = 192;  // query rows (tokens times heads of a group) that are aimed at

// Working memory of a task. "paired" is the layout of a product's right side, [n / pair][D][pair].
template <class Op>
struct Workspace {
  typedef typename Op::type T;
  int64_t most;                 // rows of a chunk, rounded up to pairs
  int64_t size, depth, padded;  // D, D rounded up to pairs and to whole vectors
  std::vector<T> q, grad;                // [most, depth]
  std::vector<T> q_paired, grad_paired;  // [most / pair][padded][pair]
  std::vector<T> keys_t, values_t;       // [depth / pair][KEYS][pair]
  std::vector<T> keys_paired;            // [KEYS / pair][padded][pair]
  std::vector<T> weights, to_scores;     // paired, [most / pair][KEYS][pair]
  std::vector<T> to_scores_rows;         // [ROWS, KEYS]
  std::vector<float> scores, to_weights;  // [ROWS, KEYS]
  std::vector<float> lse, delta;         // [most]
  std::vector<float> to_q;               // [most, padded]
  std::vector<float> to_k, to_v;         // [keys of the text, padded]

  Workspace(int64_t rows, int64_t d)
      : most((rows + 1) / 2 * 2),
        size(d),
        depth((d + 1) / 2 * 2),
        padded((d + W - 1) / W * W),
        q(most * depth),
        grad(most * depth),
        q_paired(most * padded),
        grad_paired(most * padded),
        keys_t(depth * KEYS),
        values_t(depth * KEYS),
        keys_paired(KEYS * padded),
        weights(most * KEYS),
        to_scores(most * KEYS),
        to_scores_rows(ROWS * KEYS),
        scores(ROWS * KEYS),
        to_weights(ROWS * KEYS),
        lse(most),
        delta(most),
        to_q(most * padded) {}
};

static inline int64_t tokens_of_chunk(int64_t group) { return CHUNK / group > 0 ? CHUNK / group : 1; }

// Rows `row` (even) and row + 1 of a paired matrix with `columns` columns.
template <class Op, class In>
static inline void put_rows(typename Op::type* to, int64_t row, int64_t columns, const In* first,
                            const In* second, int64_t n) {
  if constexpr (Op::pair == 1) {
    copy_row(to + row * columns, first, n);
    copy_row(to + (row + 1) * columns, second, n);
  } else {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      vh a, b;
      std::memcpy(&a, first + i, sizeof a);
      std::memcpy(&b, second + i, sizeof b);
      const vu both = __builtin_convertvector(a, vu) | __builtin_convertvector(b, vu) << 16;
      std::memcpy(to + row * columns + i * 2, &both, sizeof both);
    }
    for (; i < n; ++i) {
      to[row * columns + i * 2] = first[i];
      to[row * columns + i * 2 + 1] = second[i];
    }
  }
}

// Vectors of floats into the same rows of a matrix with KEYS columns, from column j.
template <class Op>
static inline void put_vectors(typename Op::type* to, int64_t row, int64_t j, vf first, vf second) {
  typename Op::type narrow[2 * W];
  store(narrow, first);
  store(narrow + W, second);
  put_rows<Op>(to + j * Op::pair, row, KEYS, narrow, narrow + W, W);
}

// One column of a transposed, paired matrix [depth / pair][KEYS][pair].
template <class Op, class In>
static inline void put_column(typename Op::type* to, int64_t column, const In* from, int64_t n) {
  typename Op::type* first = to + column * Op::pair;
  for (int64_t i = 0; i < n; i += Op::pair) {
    copy_row(first + i * KEYS, from + i, n - i < Op::pair ? n - i : Op::pair);
  }
}

// Keys that a row sees in a block.
struct Range {
  int first, last;
};

static inline int clamp_key(int64_t key) { return key < 0 ? 0 : key > KEYS ? KEYS : (int)key; }

// Weights and score gradients of M rows against the packed block; adds to the gradient of q.
template <class Op, int M>
static void rows(Workspace<Op>& work, int64_t row, const Range* seen, float scale) {
  const int64_t depth = Op::pair == 2 ? work.depth : work.size;
  product<Op, M, false>(work.q.data() + row * work.depth, work.depth, work.keys_t.data(), KEYS,
                        KEYS, depth, work.scores.data(), KEYS);
  product<Op, M, false>(work.grad.data() + row * work.depth, work.depth, work.values_t.data(), KEYS,
                        KEYS, depth, work.to_weights.data(), KEYS);
  for (int i = 0; i < M; ++i) {
    float* s = work.scores.data() + i * KEYS;
    for (int j = 0; j < seen[i].first; ++j) s[j] = -1e30f;
    for (int j = seen[i].last; j < KEYS; ++j) s[j] = -1e30f;
  }
  for (int i = 0; i < M; i += 2) {
    for (int j = 0; j < KEYS; j += W) {
      vf weight[2] = {}, change[2] = {};  // of a row beyond the last: nothing
      for (int r = 0; r < 2 && i + r < M; ++r) {
        const int64_t at = (i + r) * KEYS + j, of = row + i + r;
        weight[r] = exp2(load(work.scores.data() + at) * scale - work.lse[of]);
        change[r] = weight[r] * (load(work.to_weights.data() + at) - work.delta[of]);
        store(work.to_scores_rows.data() + at, change[r]);
      }
      put_vectors<Op>(work.weights.data(), row + i, j, weight[0], weight[1]);
      put_vectors<Op>(work.to_scores.data(), row + i, j, change[0], change[1]);
    }
  }
  product<Op, M, true>(work.to_scores_rows.data(), KEYS, work.keys_paired.data(), work.padded,
                       work.padded, KEYS, work.to_q.data() + row * work.padded, work.padded);
}

template <class Op>
static void some_rows(Workspace<Op>& work, int64_t row, int64_t n, const Range* seen, float scale) {
  switch (n) {
    case 6: return rows<Op, 6>(work, row, seen, scale);
    case 5: return rows<Op, 5>(work, row, seen, scale);
    case 4: return rows<Op, 4>(work, row, seen, scale);
    case 3: return rows<Op, 3>(work, row, seen, scale);
    case 2: return rows<Op, 2>(work, row, seen, scale);
    case 1: return rows<Op, 1>(work, row, seen, scale);
  }
}

// to [count, D] += leftᵀ · right over the rows first … end - 1 of both, paired.
template <class Op>
static void add_transposed(const std::vector<typename Op::type>& left,
                           const std::vector<typename Op::type>& right, int64_t padded,
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

// A chunk of query rows with the position of its first token, counted with the prefix.
struct Chunk {
  int64_t rows, group, token;
};

// The chunk against keys [0, n_keys) at positions base, base + 1, …; to_k is null for a prefix.
template <class Op, class In>
static void keys(Workspace<Op>& work, const Chunk& chunk, const In* k, int64_t k_stride,
                 const In* v, int64_t v_stride, int64_t n_keys, int64_t base, int64_t window,
                 float scale, float* to_k, float* to_v) {
  const int64_t d = work.size, furthest = chunk.token + (chunk.rows - 1) / chunk.group + 1 - base;
  if (furthest < n_keys) n_keys = furthest;
  for (int64_t block = 0; block < n_keys; block += KEYS) {
    const int64_t count = n_keys - block < KEYS ? n_keys - block : KEYS;
    if (count < KEYS) {
      std::fill(work.keys_t.begin(), work.keys_t.end(), typename Op::type{});
      std::fill(work.values_t.begin(), work.values_t.end(), typename Op::type{});
      std::fill(work.keys_paired.begin(), work.keys_paired.end(), typename Op::type{});
    }
    for (int64_t j = 0; j < count; ++j) {
      const In* key = k + (block + j) * k_stride;
      put_column<Op>(work.keys_t.data(), j, key, d);
      put_column<Op>(work.values_t.data(), j, v + (block + j) * v_stride, d);
      if (j % 2) continue;
      // Beside an odd last key itself again: no row sees it there.
      const In* next = j + 1 < count ? key + k_stride : key;
      put_rows<Op>(work.keys_paired.data(), j, work.padded, key, next, d);
    }
    int64_t seeing = chunk.rows;  // the first row that sees any of these keys, rounded to pairs
    for (int64_t row = 0; row < chunk.rows; row += ROWS) {
      const int64_t n = chunk.rows - row < ROWS ? chunk.rows - row : ROWS;
      Range seen[ROWS];
      bool any = false;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t key = chunk.token + (row + r) / chunk.group - base - block;
        seen[r].last = clamp_key(key + 1 < count ? key + 1 : count);
        seen[r].first = window ? clamp_key(key - window + 1) : 0;
        any |= seen[r].first < seen[r].last;
      }
      if (any) {
        if (seeing == chunk.rows) seeing = row;  // ROWS is even
        some_rows(work, row, n, seen, scale);
      } else if (seeing != chunk.rows) {
        // Beyond the window: no weight, but within the rows that are summed below.
        for (int64_t r = row; r < row + n; r += 2) {
          for (int64_t j = 0; j < KEYS; j += W) {
            put_vectors<Op>(work.weights.data(), r, j, vf{}, vf{});
            put_vectors<Op>(work.to_scores.data(), r, j, vf{}, vf{});
          }
        }
      }
    }
    if (to_k == nullptr || seeing == chunk.rows) continue;
    // An odd last row has one of no weight beside it.
    const int64_t end = (chunk.rows + Op::pair - 1) / Op::pair * Op::pair;
    add_transposed<Op>(work.weights, work.grad_paired, work.padded, seeing, end, count,
                       to_v + block * work.padded);
    add_transposed<Op>(work.to_scores, work.q_paired, work.padded, seeing, end, count,
                       to_k + block * work.padded);
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

template <class Op, class In>
static void text(const AttentionArguments& args, const AttentionGradients& grads,
                 Workspace<Op>& work, int64_t number, int64_t kv_head) {
  const int64_t q0 = args.q_offsets[number], q1 = args.q_offsets[number + 1];
  const int64_t k0 = args.k_offsets[number], n_keys = args.k_offsets[number + 1] - k0;
  const int64_t d = args.size, group = args.heads / args.kv_heads, padded = work.padded;
  if (q1 == q0) return;  // the gradients of its keys stay zero
  const float root = 1.0f / std::sqrt((float)d), scale = 1.442695041f * root;
  work.to_k.assign(n_keys * padded, 0.0f);
  work.to_v.assign(n_keys * padded, 0.0f);
  const int64_t tokens = tokens_of_chunk(group);
  for (int64_t token = q0; token < q1; token += tokens) {
    const int64_t end = token + tokens < q1 ? token + tokens : q1;
    const Chunk chunk{(end - token) * group, group, args.prefix + n_keys - (q1 - token)};
    std::fill(work.to_q.begin(), work.to_q.end(), 0.0f);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const int64_t head = (token + r / group) * args.heads + kv_head * group + r % group;
      const In* q = (const In*)args.q + (token + r / group) * args.q_stride +
                    (kv_head * group + r % group) * d;
      const In* grad = (const In*)grads.out + head * d;
      const In* out = (const In*)args.out + head * d;
      copy_row(work.q.data() + r * work.depth, q, d);
      copy_row(work.grad.data() + r * work.depth, grad, d);
      vf products = {};
      int64_t i = 0;
      for (; i + W <= d; i += W) products += load(grad + i) * load(out + i);
      float delta = sum(products);
      for (; i < d; ++i) delta += to_float(grad[i]) * to_float(out[i]);
      work.delta[r] = delta;
      work.lse[r] = args.lse[head] * 1.442695041f;
    }
    for (int64_t r = 0; r < chunk.rows; r += 2) {
      const int64_t next = r + 1 < chunk.rows ? r + 1 : r, depth = work.depth;
      const auto *q = work.q.data(), *grad = work.grad.data();
      put_rows<Op>(work.q_paired.data(), r, padded, q + r * depth, q + next * depth, d);
      put_rows<Op>(work.grad_paired.data(), r, padded, grad + r * depth, grad + next * depth, d);
    }
    if (args.prefix) {
      keys<Op, In>(work, chunk, (const In*)args.prefix_k + kv_head * d, args.prefix_k_stride,
                   (const In*)args.prefix_v + kv_head * d, args.prefix_v_stride, args.prefix, 0,
                   args.window, scale, nullptr, nullptr);
    }
    keys<Op, In>(work, chunk, (const In*)args.k + k0 * args.k_stride + kv_head * d, args.k_stride,
                 (const In*)args.v + k0 * args.v_stride + kv_head * d, args.v_stride, n_keys,
                 args.prefix, args.window, scale, work.to_k.data(), work.to_v.data());
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const int64_t head = (token + r / group) * args.heads + kv_head * group + r % group;
      write_rows((In*)grads.q + head * d, 0, work.to_q.data() + r * padded, padded, 1, d, root);
    }
  }
  const int64_t stride = args.kv_heads * d, first = k0 * stride + kv_head * d;
  write_rows((In*)grads.k + first, stride, work.to_k.data(), padded, n_keys, d, root);
  write_rows((In*)grads.v + first, stride, work.to_v.data(), padded, n_keys, d, 1.0f);
}

template <class Op, class In>
static void run(const AttentionArguments& args, const AttentionGradients& grads) {
  const int64_t group = args.heads / args.kv_heads, rows = tokens_of_chunk(group) * group;
  parallel_tasks(args.texts * args.kv_heads, [&](int64_t task) {
    // One workspace a thread, kept between calls: its size depends on the model alone.
    static thread_local std::unique_ptr<Workspace<Op>> work;
    if (!work || work->size != args.size || work->most < rows) {
      work.reset(new Workspace<Op>(rows, args.size));
    }
    text<Op, In>(args, grads, *work, task / args.kv_heads, task % args.kv_heads);
  });
}

}  // namespace backward

static void attention_backward(bool half, const AttentionArguments& args,
                               const AttentionGradients& grads) {
#if defined(GEN_FAST_BF16_DOT)
  if (half) return backward::run<PairOperand, bf16>(args, grads);
#else
  if (half) return backward::run<FloatOperand, bf16>(args, grads);
#endif
  backward::run<FloatOperand, float>(args, grads);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
