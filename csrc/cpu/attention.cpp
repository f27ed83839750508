// Packed attention in one pass over the keys (online softmax, as in FlashAttention).
//
// A task is a key/value head and a chunk of packed query rows, which may span several short texts.
// All query heads of the group are rows of the same small matrix. Keys and values are taken in
// blocks of 64 and repacked so that the two products run as the same register-tiled kernel:
//   scores [6, 64] += Q [6, D] · Kᵀ [D, 64]        out [6, D] += P [6, 64] · V [64, D]
// On AMX it is 16 rows, and depths are multiples of 32: what lies beyond D and beyond the last key is
// zero on both sides. Rows beyond the last of a text are those of others; they go no further than
// scores and `part`, where nothing reads them.
// The shared prefix is visited once for all rows of the chunk, each text's own keys for its rows.
#if !defined(GEN_FAST_ISA)
#define GEN_FAST_SOURCE "cpu/attention.cpp"
#define GEN_FAST_WITH_AMX
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/aligned.h"
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
  int64_t rows, size, depth, padded;  // query rows, D, and D rounded up to steps and to whole vectors
  Memory<float> out, peak, scores;
  Memory<float> mass;  // [rows, W]: the sum of weights, summed up in the end
  Memory<float> part;  // [ROWS, padded], with tiles: what a block of keys adds to out
  Memory<T> q, keys, values, weights;  // q and keys: nothing is ever written between D and depth

  Workspace(int64_t n, int64_t d)
      : rows(n),
        size(d),
        depth(rounded_up(d, STEP)),
        padded((d + W - 1) / W * W),
        out(n * padded),
        peak(n),
        scores(ROWS * KEYS),
        mass(n * W),
        part(TILES ? ROWS * padded : 0),
        q((TILES ? n + ROWS - 1 : n) * depth),  // the last row may begin a tile
        keys(depth * KEYS),
        values(KEYS * padded),
        weights(ROWS * KEYS) {}
};

// keys -> [D / pair][64][pair], values -> [64 / pair][padded][pair].
template <class Op, class In>
static void pack_block(Workspace<Op>& work, const In* k, int64_t k_stride, const In* v,
                       int64_t v_stride, int64_t count) {
  put_columns<Op>(work.keys.data(), k, k_stride, count, work.size);
  put_block_of_rows<Op>(work.values.data(), work.padded, v, v_stride, count, work.size);
}

// Scores, softmax weights and output of `rows` rows against the packed block, of which row i sees
// keys[i]. dropout: null for none.
template <class Op, class Count>
static void attend(Workspace<Op>& work, int64_t row, Count rows, const Seen* keys, float scale,
                   const Dropout* dropout) {
  typedef typename Op::type T;
  float* scores = work.scores.data();
  // Keys that no row of the tile sees, in whole vectors, are left out: half of a diagonal block.
  int furthest = 0;
  for (int i = 0; i < rows; ++i) furthest = keys[i].last > furthest ? keys[i].last : furthest;
  const int seen = (furthest + W - 1) / W * W;
  const int64_t depth = rounded_up(furthest, STEP);
  product<Op, Count, false>(work.q.data() + row * work.depth, work.depth, work.keys.data(), KEYS,
                            seen, Op::pair == 2 ? work.depth : work.size, scores, KEYS);
  [[maybe_unused]] float decays[ROWS];  // with tiles
  for (int i = 0; i < rows; ++i) {
    float* s = scores + i * KEYS;
    T* weight = work.weights.data() + i * KEYS;
    float* out = work.out.data() + (row + i) * work.padded;
    if constexpr (TILES) {
      decays[i] = 1.0f;
      for (int64_t j = seen; j < depth; j += W) store(weight + j, vf{});
    }
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
      if constexpr (TILES) {
        decays[i] = decay[0];
      } else {
        for (int64_t j = 0; j < work.padded; j += W) store(out + j, load(out + j) * decay);
      }
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
  // The rows behind those of a tile may be another text's: they stay out of its sums.
  float* sums = TILES ? work.part.data() : work.out.data() + row * work.padded;
  product<Op, Count, !TILES>(work.weights.data(), KEYS, work.values.data(), work.padded,
                             work.padded, depth, sums, work.padded);
  if constexpr (TILES) {
    for (int i = 0; i < rows; ++i) {
      if (!keys[i].any()) continue;
      float *out = work.out.data() + (row + i) * work.padded, *part = sums + i * work.padded;
      for (int64_t j = 0; j < work.padded; j += W) {
        store(out + j, load(out + j) * decays[i] + load(part + j));
      }
    }
  }
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
        with_rows(n, [&](auto rows) { attend(work, row, rows, keys, scale, dropout); });
      }
    }
  }
}

template <class Op, class In>
static void run_chunk(const AttentionArguments& args, Workspace<Op>& work, int64_t kv_head,
                      int64_t first_token, int64_t last_token, int64_t text,
                      const Philox* philox) {
  const int64_t d = args.size, group = args.heads / args.kv_heads;
  const int64_t n_rows = (last_token - first_token) * group;
  const float scale = LOG2_E / std::sqrt((float)d);  // softmax in base 2
  const In* q = (const In*)args.q;
  for (int64_t r = 0; r < n_rows; ++r) {
    const In* from = q + (first_token + r / group) * args.q_stride +
                     (kv_head * group + r % group) * d;
    copy_row(work.q.data() + r * work.depth, from, d);
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
    [[maybe_unused]] const Tiles tiles{};
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
#if defined(GEN_FAST_TILES)
  is_bf16 ? run<PairOperand, bf16>(args) : avx512::attention(false, args);
#elif defined(GEN_FAST_BF16_DOT)
  is_bf16 ? run<PairOperand, bf16>(args) : run<FloatOperand, float>(args);
#else
  is_bf16 ? run<FloatOperand, bf16>(args) : run<FloatOperand, float>(args);
#endif
}

}  // namespace gen_fast::GEN_FAST_ISA
#endif
