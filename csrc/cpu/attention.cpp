// Packed attention in one pass over the keys (online softmax, as in FlashAttention).
//
// A task is a key/value head and a chunk of packed query rows, which may span several short texts.
// All query heads of the group are rows of the same small matrix. Keys and values are taken in
// blocks of 64 and repacked so that the two products run as the same register-tiled kernel:
//   scores [6, 64] += Q [6, D] · Kᵀ [D, 64]        out [6, D] += P [6, 64] · V [64, D]
// The shared prefix is visited once for all rows of the chunk, each text's own keys for its rows.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/attention.cpp"
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/ops.h"
#include "common/each_isa.h"

namespace gen_fast {

void attention(Dtype dtype, const AttentionArguments& arguments) {
  // Whoever multiplies whole tiles of rows reads the padding behind the last text too.
  const int64_t begin = arguments.cu_seqlens_q[arguments.texts] * arguments.heads;
  const int64_t count = arguments.rows * arguments.heads - begin;
  const int64_t bytes = arguments.size * (dtype == Dtype::bf16 ? 2 : 4);
  std::memset((char*)arguments.out + begin * bytes, 0, count * bytes);
  if (arguments.lse) std::memset(arguments.lse + begin, 0, count * sizeof(float));
  GEN_FAST_DISPATCH(attention)(dtype == Dtype::bf16, arguments);
}

}  // namespace gen_fast

#else
#include "common/vector.h"
#include "common/product.h"
#include "common/philox.h"
#include "common/keys.h"

namespace gen_fast::GEN_FAST_ISA {

// Working memory of a task: fits the second-level cache.
template <class Op>
struct Workspace {
  typedef typename Op::type T;
  int64_t rows, size, padded;  // query rows, D, and D rounded up to whole vectors
  std::vector<float> out, peak, scores;
  std::vector<float> mass;  // [rows, W]: the sum of weights, summed up in the end
  std::vector<T> q, keys, values, weights;

  Workspace(int64_t n, int64_t d)
      : rows(n),
        size(d),
        padded((d + W - 1) / W * W),
        out(n * padded),
        peak(n),
        scores(ROWS * KEYS),
        mass(n * W),
        q(n * (d + d % 2)),
        keys((d + d % 2) * KEYS),
        values(KEYS * padded),
        weights(ROWS * KEYS) {}
};

// keys -> [D / pair][64][pair], values -> [64 / pair][padded][pair].
template <class Op, class In>
static void pack_block(Workspace<Op>& work, const In* k, int64_t k_stride, const In* v,
                       int64_t v_stride, int64_t count) {
  put_columns<Op>(work.keys.data(), k, k_stride, count, work.size);
  for (int64_t j = 0; j < count; j += 2) {
    // Beside an odd last value itself again: no row gives it weight there.
    const In *value = v + j * v_stride, *next = j + 1 < count ? value + v_stride : value;
    put_rows<Op>(work.values.data(), j, work.padded, value, next, work.size);
  }
}

// Scores, softmax weights and output of M rows against the packed block, of which row i sees
// keys[i]. dropout: null for none.
template <class Op, int M>
static void attend(Workspace<Op>& work, int64_t row, const Seen* keys, float scale,
                   const Dropout* dropout) {
  typedef typename Op::type T;
  const int64_t q_size = work.size + work.size % 2;
  float* scores = work.scores.data();
  // Keys that no row of the tile sees, in whole vectors, are left out: half of a diagonal block.
  int furthest = 0;
  for (int i = 0; i < M; ++i) furthest = keys[i].last > furthest ? keys[i].last : furthest;
  const int seen = (furthest + W - 1) / W * W;
  product<Op, M, false>(work.q.data() + row * q_size, q_size, work.keys.data(), KEYS, seen,
                        Op::pair == 2 ? q_size : work.size, scores, KEYS);
  for (int i = 0; i < M; ++i) {
    float* s = scores + i * KEYS;
    T* weight = work.weights.data() + i * KEYS;
    float* out = work.out.data() + (row + i) * work.padded;
    if (!keys[i].any()) {
      for (int j = 0; j < seen; j += W) store(weight + j, vf{});
      continue;
    }
    keys[i].hide(s, seen);
    vf top = load(s);
    for (int j = W; j < seen; j += W) top = max(top, load(s + j));
    // Library functions would save and restore every register.
    const float old_peak = work.peak[row + i], block_peak = max_of(top) * scale;
    const float new_peak = old_peak > block_peak ? old_peak : block_peak;
    float* mass = work.mass.data() + (row + i) * W;
    if (new_peak > old_peak) {
      const vf decay = exp2(splat(old_peak - new_peak));
      store(mass, load(mass) * decay);
      for (int64_t j = 0; j < work.padded; j += W) store(out + j, load(out + j) * decay);
      work.peak[row + i] = new_peak;
    }
    vf added = {};
    for (int j = 0; j < seen; j += W) {
      const vf w = exp2(load(s + j) * scale - new_peak);
      added += w;
      store(weight + j, w);
    }
    store(mass, load(mass) + added);
    if (dropout) {  // after the sum: weights are of all that is seen
      uint32_t masks[KEYS];
      dropout->put_masks(i, seen, masks);
      for (int j = 0; j < seen; j += W) store(weight + j, keep(load(weight + j), masks + j));
    }
  }
  product<Op, M, true>(work.weights.data(), KEYS, work.values.data(), work.padded, work.padded,
                       (furthest + 1) / 2 * 2, work.out.data() + row * work.padded, work.padded);
}

// A run of query rows of one chunk, all of one text.
struct Rows {
  int64_t begin, end;  // rows of the chunk
  int64_t position;    // of the first row's token, prefix included
  TextMask mask;
};

// All runs against keys [0, n_keys) that stand at positions base, base + 1, … . dropout: null for
// none; it is of one text, so of one run.
template <class Op, class In>
static void attend_keys(Workspace<Op>& work, const Rows* runs, int64_t n_runs, int64_t group,
                        const In* k, int64_t k_stride, const In* v, int64_t v_stride,
                        int64_t n_keys, int64_t base, float scale, Dropout* dropout) {
  int64_t furthest = 0;
  for (int64_t i = 0; i < n_runs; ++i) {
    const int64_t last = runs[i].position + (runs[i].end - runs[i].begin - 1) / group;
    const int64_t reach = runs[i].mask.reach(last, base, n_keys);
    furthest = reach > furthest ? reach : furthest;
  }
  for (int64_t block = 0; block < furthest; block += KEYS) {
    const int64_t count = furthest - block < KEYS ? furthest - block : KEYS;
    bool packed = false;
    for (int64_t i = 0; i < n_runs; ++i) {
      for (int64_t row = runs[i].begin; row < runs[i].end; row += ROWS) {
        const int64_t n = runs[i].end - row < ROWS ? runs[i].end - row : ROWS;
        Seen keys[ROWS];
        bool any = false;
        for (int64_t r = 0; r < n; ++r) {
          const int64_t position = runs[i].position + (row + r - runs[i].begin) / group;
          keys[r] = runs[i].mask.seen(position, base + block, count);
          any |= keys[r].any();
        }
        if (!any) continue;
        if (!packed) {
          pack_block(work, k + block * k_stride, k_stride, v + block * v_stride, v_stride, count);
          if (dropout) dropout->go_to_block(block);
        }
        packed = true;
        if (dropout) dropout->go_to_rows(n, row - runs[i].begin, runs[i].position, group);
        with_rows(n, [&](auto rows) { attend<Op, rows>(work, row, keys, scale, dropout); });
      }
    }
  }
}

template <class Op, class In>
static void run_chunk(const AttentionArguments& args, Workspace<Op>& work, int64_t kv_head,
                      int64_t first_token, int64_t last_token, int64_t text,
                      const Philox* philox) {
  const int64_t d = args.size, group = args.heads / args.kv_heads, q_size = d + d % 2;
  const int64_t n_rows = (last_token - first_token) * group;
  const float scale = LOG2_E / std::sqrt((float)d);  // softmax in base 2
  const In* q = (const In*)args.q;
  for (int64_t r = 0; r < n_rows; ++r) {
    const In* from = q + (first_token + r / group) * args.q_stride +
                     (kv_head * group + r % group) * d;
    copy_row(work.q.data() + r * q_size, from, d);
    if (d % 2) assign(work.q.data() + r * q_size + d, 0.0f);
    work.peak[r] = HIDDEN;
  }
  std::memset(work.mass.data(), 0, n_rows * W * sizeof(float));
  std::memset(work.out.data(), 0, n_rows * work.padded * sizeof(float));

  std::vector<Rows> runs;
  std::vector<int64_t> texts;
  for (int64_t token = first_token; token < last_token; ++text) {
    const int64_t q1 = args.cu_seqlens_q[text + 1];
    if (q1 <= token) continue;
    const int64_t end = q1 < last_token ? q1 : last_token;
    const int64_t n_keys = args.cu_seqlens_k[text + 1] - args.cu_seqlens_k[text];
    runs.push_back({(token - first_token) * group, (end - first_token) * group,
                    args.prefix + n_keys - (q1 - token), TextMask(args, text)});
    texts.push_back(text);
    token = end;
  }

  if (args.prefix) {
    attend_keys(work, runs.data(), (int64_t)runs.size(), group,
                (const In*)args.prefix_k + kv_head * d, args.prefix_k_stride,
                (const In*)args.prefix_v + kv_head * d, args.prefix_v_stride, args.prefix, 0,
                scale, nullptr);
  }
  for (size_t i = 0; i < runs.size(); ++i) {
    const int64_t k0 = args.cu_seqlens_k[texts[i]], k1 = args.cu_seqlens_k[texts[i] + 1];
    std::optional<Dropout> dropout;
    if (philox) dropout.emplace(*philox, args, texts[i], kv_head * group);
    attend_keys(work, &runs[i], 1, group, (const In*)args.k + k0 * args.k_stride + kv_head * d,
                args.k_stride, (const In*)args.v + k0 * args.v_stride + kv_head * d,
                args.v_stride, k1 - k0, args.prefix, scale, dropout ? &*dropout : nullptr);
  }

  In* out = (In*)args.out;
  for (int64_t r = 0; r < n_rows; ++r) {
    In* to = out + ((first_token + r / group) * args.heads + kv_head * group + r % group) * d;
    const float mass = sum(load(work.mass.data() + r * W)), inverse = args.kept_scale / mass;
    if (args.lse) {
      args.lse[(first_token + r / group) * args.heads + kv_head * group + r % group] =
          (work.peak[r] + std::log2(mass)) * LN_2;
    }
    const float* from = work.out.data() + r * work.padded;
    int64_t i = 0;
    for (; i + W <= d; i += W) store(to + i, load(from + i) * inverse);
    for (; i < d; ++i) assign(to + i, from[i] * inverse);
  }
}

template <class Op, class In>
static void run(const AttentionArguments& args) {
  const int64_t rows = args.cu_seqlens_q[args.texts], group = args.heads / args.kv_heads;
  const int64_t tokens = tokens_of_chunk(group);
  const int64_t chunks = (rows + tokens - 1) / tokens;
  const int64_t keys = args.cu_seqlens_k[args.texts] + args.prefix;
  const int64_t elements = (rows * args.heads + keys * args.kv_heads) * args.size;
  std::optional<Philox> philox;
  if (args.text_keys) philox.emplace(args.seed, args.first_kept);
  parallel_tasks(chunks * args.kv_heads, elements, [&](int64_t task) {
    // One workspace a thread, kept between calls: its size depends on the model alone.
    static thread_local std::unique_ptr<Workspace<Op>> work;
    if (!work || work->size != args.size || work->rows < tokens * group) {
      work.reset(new Workspace<Op>(tokens * group, args.size));
    }
    // The last chunks see the most keys of a long text: they go first, so that threads end alike.
    const int64_t chunk = chunks - 1 - task / args.kv_heads;
    const int64_t first = chunk * tokens;
    const int64_t last = first + tokens < rows ? first + tokens : rows;
    int64_t low = 0, high = args.texts;  // the text of `first`
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (args.cu_seqlens_q[middle] <= first ? low : high) = middle;
    }
    run_chunk<Op, In>(args, *work, task % args.kv_heads, first, last, low,
                      philox ? &*philox : nullptr);
  });
}

static void attention(bool is_bf16, const AttentionArguments& args) {
#if defined(GEN_FAST_BF16_DOT)
  if (is_bf16) return run<PairOperand, bf16>(args);
#else
  if (is_bf16) return run<FloatOperand, bf16>(args);
#endif
  run<FloatOperand, float>(args);
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
