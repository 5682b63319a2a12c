// Products of activations with a weight of floats, over the lanes of one path.
// A strip is 16 columns: the numbers of its first input, then those of the second, and so on.
// Products are summed in ascending order inside a piece of `kInputs` inputs, and the sums of pieces
// likewise, so that no bit hangs on how many rows and strips share a loop.

constexpr int64_t kInputs = 256;  // of a piece: its 16 strips of float32 fit into a second cache

// Inputs that are asked for ahead of their use; behind a strip's end those of the strip C further
// on. 16 rows x SmolLM2's head in float32, one thread: 17.6 -> 15.1 ms against 2 KiB ahead.
constexpr int64_t kAheadInputs = 128;

template <FloatType T>
INLINE Floats load_floats(const uint8_t* p) {
  if (T == FloatType::kFloat32) return load(reinterpret_cast<const float*>(p));
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(p);
  return T == FloatType::kBfloat16 ? load_bfloat16(halves) : load_half(halves);
}

// C strips for R rows: R * C sums at a time hide each other's latency.
template <int R, int C, FloatType T>
INLINE void float_tile(const FloatMatmul& m, int64_t strip, int64_t row) {
  constexpr int64_t size = kLanes * (T == FloatType::kFloat32 ? 4 : 2);
  const uint8_t* weight = m.strips + strip * m.depth * size;
  const float* x = m.x + row * m.depth;
  const int64_t near = kAheadInputs * size, next = near + (C - 1) * m.depth * size;
  Floats out[R * C];
  for (int i = 0; i < R * C; ++i) out[i] = splat(0.0f);
  for (int64_t start = 0; start < m.depth; start += kInputs) {
    const int64_t end = start + kInputs < m.depth ? start + kInputs : m.depth;
    Floats dot[R * C];
UNROLL
    for (int i = 0; i < R * C; ++i) dot[i] = splat(0.0f);
    for (int64_t k = start; k < end; ++k) {
      const int64_t ahead = k + kAheadInputs < m.depth ? near : next;
      Floats w[C];
UNROLL
      for (int c = 0; c < C; ++c) {
        const uint8_t* p = weight + (c * m.depth + k) * size;
        __builtin_prefetch(p + ahead);
        w[c] = load_floats<T>(p);
      }
UNROLL
      for (int r = 0; r < R; ++r) {
        const Floats each = splat(x[r * m.depth + k]);
UNROLL
        for (int c = 0; c < C; ++c) dot[r * C + c] = dot[r * C + c] + each * w[c];
      }
    }
    for (int i = 0; i < R * C; ++i) out[i] = out[i] + dot[i];
  }
  for (int i = 0; i < R * C; ++i) {
    const int64_t column = (strip + i % C) * kLanes, left = m.columns - column;
    float* to = m.out + (row + i / C) * m.columns + column;
    if (left >= kLanes) {
      store(to, out[i]);
    } else {
      store(to, out[i], left);
    }
  }
}

// Strips first..last-1 for the rows from `row` on: R at a time, then R / 2 and so on.
template <int R, FloatType T>
INLINE void float_rows(const FloatMatmul& m, int64_t first, int64_t last, int64_t row) {
  constexpr int C = kSums / R < kStrips ? kSums / R : kStrips;
  const int64_t end = row + (m.rows - row) / R * R;
  int64_t strip = first;
  for (; strip + C <= last; strip += C)
    for (int64_t r = row; r < end; r += R) float_tile<R, C, T>(m, strip, r);
  for (; strip < last; ++strip)
    for (int64_t r = row; r < end; r += R) float_tile<R, 1, T>(m, strip, r);
  if constexpr (R > 1) float_rows<R / 2, T>(m, first, last, end);
}

// A few strips stay in a near cache while all rows are multiplied with them.
template <FloatType T>
void float_strips(const FloatMatmul& m, int64_t first, int64_t last) {
  for (; first < last; first += kStrips)
    float_rows<kFloatRows, T>(m, first, first + kStrips < last ? first + kStrips : last, 0);
}

// Computes strips first..last-1 for all rows.
void float_matmul(const FloatMatmul& m, int64_t first, int64_t last) {
  if (m.type == FloatType::kFloat32) return float_strips<FloatType::kFloat32>(m, first, last);
  m.type == FloatType::kBfloat16 ? float_strips<FloatType::kBfloat16>(m, first, last)
                                 : float_strips<FloatType::kFloat16>(m, first, last);
}
