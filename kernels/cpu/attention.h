// Attention of one or more queries over keys and values in blocks, over the lanes of one path.
// Keys are taken in pieces of `kPiece`, each with a softmax of its own; `merge` joins the pieces
// (online softmax, arXiv:1805.02867). Pieces do not depend on threads, so no bit of the result does.

// e^x for x <= 0, and 0 below -87: 2^n e^r with |r| <= ln 2 / 2, Taylor's series to r^7.
INLINE Floats exp_below_zero(Floats x) {
  const Floats low = splat(-87.0f);
  const Floats kept = larger(low, x);
  const Ints n = nearest(kept * splat(1.44269504f));
  const Floats whole = to_floats(n);
  const Floats r = (kept - whole * splat(0.693145752f)) - whole * splat(1.42860677e-6f);
  const float series[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  Floats p = splat(1.0f / 5040);
  for (const float c : series) p = p * r + splat(c);
  return where_above(x, low, floats_of(bits_of(p) + shift_left(n, 23)));
}

INLINE float exp_below_zero(float x) {
  float all[kLanes];
  store(all, exp_below_zero(splat(x)));
  return all[0];
}

// Keys that row `row` of a head group sees: the last query sees all of them, others fewer.
INLINE int64_t visible(const PagedAttention& a, int64_t sequence, int64_t row) {
  return a.lengths[sequence] - (a.queries - 1 - row % a.queries);
}

// Where a key lies, counted in keys of one head.
INLINE int64_t place(const PagedAttention& a, int64_t sequence, int64_t position, int64_t head) {
  const int64_t block = a.table[sequence * a.table_len + position / a.block_len];
  return (block * a.block_len + position % a.block_len) * a.kv_heads + head;
}

template <KvType T>
INLINE Floats load_kv(const void* p, int64_t at) {
  if (T == KvType::kFloat32) return load(static_cast<const float*>(p) + at);
  if (T == KvType::kBfloat16) return load_bfloat16(static_cast<const uint16_t*>(p) + at);
  return load_int8(static_cast<const int8_t*>(p) + at);
}

// Asks for keys or values some places ahead: they lie apart, so a core's own prefetcher is no help.
template <KvType T>
INLINE void ask_ahead(const PagedAttention& a, const void* pool, const int64_t* places, int64_t i,
                      int64_t keys) {
  constexpr int64_t kAheadKeys = 12;
  constexpr int64_t size = T == KvType::kFloat32 ? 4 : T == KvType::kBfloat16 ? 2 : 1;
  if (i + kAheadKeys >= keys) return;
  const char* p = static_cast<const char*>(pool) + places[i + kAheadKeys] * a.head_dim * size;
  for (int64_t byte = 0; byte < a.head_dim * size; byte += 64) __builtin_prefetch(p + byte);
}

// Row `row` of a head group: query row % queries of query head head * group + row / queries.
INLINE int64_t query_at(const PagedAttention& a, int64_t sequence, int64_t head, int64_t row) {
  const int64_t n = head * (a.heads / a.kv_heads) + row / a.queries;
  return ((sequence * a.queries + row % a.queries) * a.heads + n) * a.head_dim;
}

INLINE float* partial_of(const PagedAttention& a, int64_t sequence, int64_t head, int64_t piece) {
  const int64_t rows = a.heads / a.kv_heads * a.queries;
  return a.partial +
         ((sequence * a.kv_heads + head) * a.pieces + piece) * rows * (a.head_dim + 2);
}

// Mixes values of W lanes-wide strips from `h` on; W sums at a time hide each other's latency.
template <KvType T, int W>
INLINE void mix(const PagedAttention& a, const float* weights, const int64_t* places,
                int64_t count, int64_t h, bool first, float* out) {
  Floats sums[W];
  UNROLL
  for (int w = 0; w < W; ++w) sums[w] = splat(0.0f);
  for (int64_t i = 0; i < count; ++i) {
    if (first) ask_ahead<T>(a, a.v, places, i, count);
    const Floats weight = splat(weights[i]);
    UNROLL
    for (int w = 0; w < W; ++w)
      sums[w] = sums[w] + weight * load_kv<T>(a.v, places[i] * a.head_dim + h + w * kLanes);
  }
  for (int w = 0; w < W; ++w) store(out + h + w * kLanes, sums[w]);
}

// Scores of one query with kLanes keys; those from `ahead` on, if there are any, are asked for.
template <KvType T>
INLINE void score(const PagedAttention& a, const float* q, const int64_t* places, int64_t ahead,
                  float* out) {
  Floats dots[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) ask_ahead<T>(a, a.k, places, i, ahead);
  UNROLL
  for (int64_t first = 0; first < kLanes; first += kKeys) {
    UNROLL
    for (int64_t i = first; i < first + kKeys; ++i) dots[i] = splat(0.0f);
    for (int64_t h = 0; h < a.head_dim; h += kLanes) {
      const Floats part = load(q + h);
      UNROLL
      for (int64_t i = first; i < first + kKeys; ++i)
        dots[i] = dots[i] + part * load_kv<T>(a.k, places[i] * a.head_dim + h);
    }
  }
  store(out, sums(dots) * splat(a.scale));
  if (T == KvType::kInt8)
    for (int64_t i = 0; i < kLanes; ++i) out[i] *= a.k_scale[places[i]];
}

template <KvType T>
void attend_piece(const PagedAttention& a, int64_t sequence, int64_t head, int64_t piece,
                  int64_t first, int64_t last) {
  const int64_t start = piece * kPiece, H = a.head_dim;
  float* partial = partial_of(a, sequence, head, piece) + first * (H + 2);
  float scores[kPiece];
  int64_t places[kPiece];
  const int64_t left = a.lengths[sequence] - start;
  const int64_t keys = left < 0 ? 0 : left < kPiece ? left : kPiece;
  for (int64_t i = 0; i < keys; ++i) places[i] = place(a, sequence, start + i, head);
  for (int64_t i = keys; i % kLanes; ++i) places[i] = places[0];  // read, and not used
  for (int64_t row = first; row < last; ++row, partial += H + 2) {
    const int64_t seen = visible(a, sequence, row) - start;
    const int64_t count = seen < 0 ? 0 : seen < keys ? seen : keys;
    const float* q = a.q + query_at(a, sequence, head, row);
    Floats tops = splat(-INFINITY);
    for (int64_t i = 0; i < count; i += kLanes) {
      score<T>(a, q, places + i, row == first ? count - i : 0, scores + i);
      for (int64_t j = count; j < i + kLanes; ++j) scores[j] = -INFINITY;
      tops = larger(load(scores + i), tops);
    }
    const float top = largest(tops);
    Floats total = splat(0.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats weight = exp_below_zero(load(scores + i) - splat(top));
      store(scores + i, weight);
      total = total + weight;
    }
    partial[H] = top;
    partial[H + 1] = sum(total);
    if (T == KvType::kInt8)
      for (int64_t i = 0; i < count; ++i) scores[i] *= a.v_scale[places[i]];
    int64_t h = 0;
    const bool ahead = row == first;
    for (; h + 4 * kLanes <= H; h += 4 * kLanes)
      mix<T, 4>(a, scores, places, count, h, ahead && h == 0, partial);
    for (; h < H; h += kLanes) mix<T, 1>(a, scores, places, count, h, ahead && h == 0, partial);
  }
}

// Rows first..last-1 of a head group over one piece of the keys.
void attend(const PagedAttention& a, int64_t sequence, int64_t head, int64_t piece, int64_t first,
            int64_t last) {
  const auto each = a.type == KvType::kFloat32    ? attend_piece<KvType::kFloat32>
                    : a.type == KvType::kBfloat16 ? attend_piece<KvType::kBfloat16>
                                                  : attend_piece<KvType::kInt8>;
  each(a, sequence, head, piece, first, last);
}

// Joins the pieces of one head group; rows that see no key become 0.
void merge(const PagedAttention& a, int64_t sequence, int64_t head) {
  const int64_t rows = a.heads / a.kv_heads * a.queries, H = a.head_dim;
  const int64_t step = rows * (H + 2), left = a.lengths[sequence];
  const int64_t pieces = left <= 0 ? 0 : (left + kPiece - 1) / kPiece;
  for (int64_t row = 0; row < rows; ++row) {
    const float* first = partial_of(a, sequence, head, 0) + row * (H + 2);
    float* out = a.out + query_at(a, sequence, head, row);
    float top = -INFINITY, total = 0.0f;
    for (int64_t i = 0; i < pieces; ++i) {
      const float here = first[i * step + H];
      top = here > top ? here : top;
    }
    for (int64_t h = 0; h < H; h += kLanes) store(out + h, splat(0.0f));
    for (int64_t i = 0; i < pieces; ++i) {
      const float* part = first + i * step;
      if (part[H + 1] == 0.0f) continue;  // saw no key of this piece
      const float shrink = exp_below_zero(part[H] - top);
      total = total + part[H + 1] * shrink;
      for (int64_t h = 0; h < H; h += kLanes)
        store(out + h, load(out + h) + load(part + h) * splat(shrink));
    }
    if (total == 0.0f) continue;
    const float inverse = 1.0f / total;
    for (int64_t h = 0; h < H; h += kLanes) store(out + h, load(out + h) * splat(inverse));
  }
}
